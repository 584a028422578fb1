"""The engine's forward: one packed batch of tokens, each with the slot of its request's adapter.

    batch of the engine   (1, T) ids, positions, mask, where to read and write, the last tokens
    → slots               (1, T) which adapter each token uses
    → compiled forward    as a call with T requests of one token each (`PACKED_DIMS`)

All steps run the graphs with adapters, also those of the base alone, so that no step waits for a
graph that others have not needed. What the engine hands over are views of its own buffers; graphs
depend on how tensors lie, so they get copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.adapter_store.names import BASE
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
    """

    def __init__(
        self, compiled: CompiledModel, batch: Callable[[], list[FutureRequestState]]
    ) -> None:
        self._compiled = compiled
        self._batch = batch
        self._pages: StepCache | None = None

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
        session = compiled._session
        with session.lock:
            names, tokens = self._tokens(length)
            compiled._check_attached()

            def run() -> Any:
                active = session.running._replace(active=True)
                entry = compiled.entry(compiled.model, packed=True)
                return session.run(active, lambda: entry(**named))

            with self._traced():
                output = session.call(run, names, tokens=tokens, packed=True)
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

    def _tokens(self, length: int) -> tuple[list[str], Tensor]:
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
                name = None if hold is None else store.held_name(hold)
                found[ticket] = -1 if name is None else places.setdefault(name, len(places))
            count, state = future.query_length, future.state
            before = state.inactive(count) if isinstance(state, AdapterRequest) else 0
            numbers += [-1, found[ticket]]
            counts += [before, count - before]
            if ticket is not None:
                named = BASE if ticket.hold is None else str(ticket.hold.name)
                self._compiled._session.tokens[named] += count
        counts.append(length - sum(counts))
        numbers.append(-1)
        tokens = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        return list(places), tokens[None]


def _laid_out(mask: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(mask, Tensor):
        return mask.clone(memory_format=torch.contiguous_format)
    return {kind: _laid_out(of_kind) for kind, of_kind in mask.items()}
