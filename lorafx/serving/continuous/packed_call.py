"""The engine's forward: one packed batch of tokens, each with the slot of its request's adapter.

    batch of the engine   (1, T) ids, positions, mask, where to read and write, the last tokens
    → slots               (1, T) which adapter each token uses
    → compiled forward    as a call with T requests of one token each (`PACKED_DIMS`)

All steps run the graphs with adapters, also those of the base alone, so that no step waits for a
graph that others have not needed. Where a step is refused, each of its adapters is tried alone; the
step runs without those that are refused then, whose requests fail. What a try has overwritten of
the windows of a sliding attention is put back before the next. What the engine hands over are
views of its own buffers; graphs depend on how tensors lie, so they get copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.adapter_store.holding import Hold
from lorafx.adapter_store.names import BASE
from lorafx.errors import LorafxError
from lorafx.serving.continuous.eager import EAGER, TracedEager
from lorafx.serving.continuous.requests import AdapterRequest, Ticket, ticket_of
from lorafx.serving.continuous.step_cache import StepCache

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel


_EAGER = TracedEager()
_NOTHING = nullcontext()


class PackedForward:
    """Called by the engine in place of the model.

    Args:
        compiled: serves the model.
        batch: gives the requests of the step, in the order of their tokens.

    Attributes:
        refused: the tickets of the last step whose adapters are refused, and why. Their tokens were
            served as the base, and what came of them is nothing to anybody.
    """

    def __init__(
        self, compiled: CompiledModel, batch: Callable[[], list[FutureRequestState]]
    ) -> None:
        self._compiled = compiled
        self._batch = batch
        self._pages: StepCache | None = None
        self.refused: dict[Ticket, LorafxError] = {}

    def _supports_logits_to_keep(self) -> bool:
        """Asked by the engine: whether the head is only computed for tokens that need it."""
        supports = getattr(self._compiled.model, "_supports_logits_to_keep", None)
        return supports is not None and bool(supports())

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor],
        cache: Any,
        read_index: list[Tensor],
        write_index: list[Tensor],
        logits_to_keep: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The model's output for one step. `others` say how flash attention reads its batch, and
        what the engine itself does with the logits."""
        compiled = self._compiled
        if self._pages is None or self._pages.pages is not cache.cache_tensor:
            self._pages = StepCache(cache)
        length = input_ids.shape[1]
        step = self._pages.step(read_index, write_index)
        named: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": _laid_out(attention_mask),
            "cache": step,
            "use_cache": False,
            "is_causal": False,
        }
        # Sizes of one have graphs of their own: a single last token is asked for twice.
        single = logits_to_keep is not None and logits_to_keep.shape[0] == 1
        if logits_to_keep is not None:
            named["logits_to_keep"] = logits_to_keep.repeat(2) if single else logits_to_keep.clone()
        self.refused = {}
        with compiled._session.lock:
            self._count()
            holds = self._holds()
            put_back = step.kept() if holds else None
            try:
                output = self._run(named, length)
            except LorafxError:
                if put_back is None:
                    raise
                self.refused = self._refused(named, length, holds, put_back)
                if not self.refused:
                    raise
                put_back()
                output = self._run(named, length)
        if single:
            output.logits = output.logits[:, :1]
        return output

    def forget(self) -> None:
        """Let go of the cache."""
        self._pages = None

    def _traced(self) -> AbstractContextManager[object]:
        """Around a step: the eager attention over pages, where the model uses it."""
        model: Any = self._compiled.model
        return _EAGER if model.config._attn_implementation == EAGER else _NOTHING

    def _run(self, named: Mapping[str, Any], length: int, alone: Hold | None = None) -> Any:
        """The model's output for these arguments, where adapters are active that are not refused,
        or one `alone`. The session's lock is held."""
        compiled, session = self._compiled, self._compiled._session
        names, tokens = self._tokens(length, alone)
        compiled._check_attached()

        def run() -> Any:
            active = session.running._replace(active=True)
            entry = compiled.entry(compiled.model, packed=True)
            return session.run(active, lambda: entry(**named))

        with self._traced():
            return session.call(run, names, tokens=tokens, packed=True)

    def _holds(self) -> dict[Ticket, Hold]:
        """The adapters of the step; none where one has all of it, which tried alone would be the
        same step again."""
        tickets = dict.fromkeys(ticket_of(future.state) for future in self._batch())
        holds = {t: t.hold for t in tickets if t is not None and t.hold is not None}
        several = len({hold.stored.version for hold in holds.values()}) > 1
        return holds if several or len(holds) < len(tickets) else {}

    def _refused(
        self,
        named: Mapping[str, Any],
        length: int,
        holds: Mapping[Ticket, Hold],
        put_back: Callable[[], None],
    ) -> dict[Ticket, LorafxError]:
        """The tickets of the step whose adapter is refused alone; none where what is refused is the
        mix."""
        errors: dict[int, LorafxError] = {}
        for hold in {hold.stored.version: hold for hold in holds.values()}.values():
            put_back()
            try:
                self._run(named, length, alone=hold)
            except LorafxError as error:
                errors[hold.stored.version] = error
        return {
            ticket: errors[hold.stored.version]
            for ticket, hold in holds.items()
            if hold.stored.version in errors
        }

    def _count(self) -> None:
        """Note how many tokens of each adapter are run."""
        for future in self._batch():
            ticket = ticket_of(future.state)
            if ticket is not None:
                named = BASE if ticket.hold is None else str(ticket.hold.name)
                self._compiled._session.tokens[named] += future.query_length

    def _tokens(self, length: int, alone: Hold | None) -> tuple[list[str], Tensor]:
        """The adapters of the step, and which of them each token uses: (1, T), -1 for the base and
        for padding."""
        store = self._compiled._session.store
        places: dict[str, int] = {}
        found: dict[Ticket | None, int] = {None: -1}
        numbers: list[int] = []
        counts: list[int] = []
        for future in self._batch():
            ticket = ticket_of(future.state)
            if ticket not in found:
                assert ticket is not None
                hold = ticket.hold
                other = alone is not None and hold is not None and hold.stored is not alone.stored
                if hold is None or other or ticket in self.refused:
                    found[ticket] = -1
                else:
                    found[ticket] = places.setdefault(store.held_name(hold), len(places))
            count, state = future.query_length, future.state
            before = state.inactive(count) if isinstance(state, AdapterRequest) else 0
            numbers += [-1, found[ticket]]
            counts += [before, count - before]
        counts.append(length - sum(counts))
        numbers.append(-1)
        tokens = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        return list(places), tokens[None]


def _laid_out(mask: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(mask, Tensor):
        return mask.clone(memory_format=torch.contiguous_format)
    return {kind: _laid_out(of_kind) for kind, of_kind in mask.items()}
