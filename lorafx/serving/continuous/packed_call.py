"""The engine's forward: one packed batch of tokens, each with the slot of its request's adapter.

    batch of the engine   (1, T) ids, positions, mask, where to read and write, the last tokens
    → slots               (1, T) which adapter each token uses
    → compiled forward    as a call with T requests of one token each (`PACKED_DIMS`)

All steps run the graphs with adapters, also those of the base alone, so that no step waits for a
graph that others have not needed. A step that fails is run in parts (`isolate_failures.py`), so
that only the requests fail that cannot be served. A part has all tokens of the step, for the same
graphs: those of other requests are copies of one of its own, of the base, and write nothing into
the cache. What a part that fails has overwritten of the windows of a sliding attention is put back.
What the engine hands over are views of its own buffers; graphs depend on how tensors lie, so they
get copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.adapter_store.holding import Hold
from lorafx.adapter_store.names import BASE
from lorafx.serving.continuous.adapter_requests import AdapterRequest, Ticket, ticket_of
from lorafx.serving.continuous.eager import EAGER, TracedEager
from lorafx.serving.continuous.isolate_failures import OF_THE_DEVICE, in_parts
from lorafx.serving.continuous.step_cache import ATTENDING_DEVICES, StepCache
from lorafx.session.loading import fill_ahead

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel


_EAGER = TracedEager()
_NOTHING = nullcontext()


class LastTokens(NamedTuple):
    """The last token of each request of a step.

    Attributes:
        places: those of the requests in the step, with a new token first.
        tokens: those of their last tokens in the packed sequence.
    """

    places: list[int]
    tokens: Tensor

    @staticmethod
    def of(batch: Sequence[FutureRequestState], device: torch.device) -> LastTokens:
        """Of the requests of a step."""
        ends = [*accumulate(future.query_length for future in batch)]
        places = sorted(range(len(batch)), key=lambda place: not batch[place].has_new_token)
        tokens = torch.tensor([ends[place] - 1 for place in places], dtype=torch.int32)
        return LastTokens(places, tokens.to(device))

    def check(self, output: Any, named: Mapping[str, Any], part: Collection[int]) -> None:
        """Raise FloatingPointError where what comes of a request of `part` is not finite. In the
        keys of one request that reaches the output of all, masked or not."""
        logits = output.logits[0]
        if "logits_to_keep" not in named:
            logits = logits[self.tokens]
        rows = [row for row, place in enumerate(self.places) if place in part]
        if not logits[rows].amax(-1).isfinite().all():
            raise FloatingPointError(
                "the logits of its next token are not finite; look for infinite or very large "
                "numbers in its adapter, or give the model a dtype with a larger range"
            )


class PackedForward:
    """Called by the engine in place of the model.

    Args:
        compiled: serves the model.
        batch: gives the requests of the step, in the order of their tokens.
        waiting: gives the adapters of the others, in the order in which they may come.

    Attributes:
        failed: the requests of the last step that failed, by their names, and why. What came of
            them in a step that others have gone on from is nothing to anybody.
        searches: whether a step that fails is run in parts.
        waits: whether the host waits for each step, and so may look at what came of it.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        batch: Callable[[], list[FutureRequestState]],
        waiting: Callable[[], Iterable[Hold]],
    ) -> None:
        self._compiled = compiled
        self._batch = batch
        self._waiting = waiting
        self._pages: StepCache | None = None
        self.failed: dict[str, Exception] = {}
        self.searches = self.waits = True

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
        masks = _laid_out(attention_mask)
        step = self._pages.step(
            read_index, write_index, *_by_kind(self._pages.kinds, length, masks, others)
        )
        named: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": masks,
            "cache": step,
            "use_cache": False,
            "is_causal": False,
        }
        # Sizes of one have graphs of their own: a single last token is asked for twice.
        single = logits_to_keep is not None and logits_to_keep.shape[0] == 1
        self.failed = {}
        batch = self._batch()
        last = None
        if self.waits:
            last = LastTokens.of(batch, input_ids.device)
            if logits_to_keep is not None:
                more = logits_to_keep.shape[0] - len(batch)
                logits_to_keep = nn.functional.pad(last.tokens, (0, more))
        if logits_to_keep is not None:
            named["logits_to_keep"] = logits_to_keep.repeat(2) if single else logits_to_keep.clone()
        with compiled._session.lock:
            self._count(batch)
            put_back = step.kept() if self.searches and len(batch) > 1 else None
            try:
                output = self._run(named, length, batch)
                if last is not None:
                    last.check(output, named, range(len(batch)))
            except OF_THE_DEVICE:
                raise
            except Exception as error:
                if put_back is None:
                    raise
                put_back(None)
                output = self._in_parts(
                    named, length, batch, put_back, error, others["cu_seq_lens_k"], last
                )
            fill_ahead(compiled._session, self._waiting())  # while the step runs
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

    def _in_parts(
        self,
        named: Mapping[str, Any],
        length: int,
        batch: Sequence[FutureRequestState],
        put_back: Callable[[Tensor | None], None],
        error: Exception,
        key_counts: Mapping[str, Tensor],
        last: LastTokens | None,
    ) -> Any:
        """The model's output for a step that failed with `error` as a whole, in its first part that
        is served. Notes which requests fail.

        Raises:
            The error, where all of them do.
        """
        ids = named["input_ids"]
        owners = _owners([future.query_length for future in batch], length)
        cache: StepCache = named["cache"]
        of_keys = [
            _owners(key_counts[kind].diff().tolist(), rows.shape[0])
            for kind, rows in zip(cache.kinds, cache.read, strict=True)
        ]

        def run(part: Sequence[int]) -> Any:
            absent = ~torch.isin(owners, torch.tensor(part))
            own = int(absent.long().argmin())
            there = absent.to(ids.device)
            tokens = {
                name: torch.where(there, named[name][..., own : own + 1], named[name])
                for name in ("input_ids", "position_ids")
            }
            absent_keys = [
                ~torch.isin(of_group, torch.tensor(part)).to(ids.device) for of_group in of_keys
            ]
            changed = {**tokens, "cache": cache.without(there, absent_keys)}
            try:
                output = self._run({**named, **changed}, length, batch, part)
                if last is not None:
                    last.check(output, named, part)
                return output
            except Exception:
                put_back(~there)
                raise

        tickets = [ticket_of(future.state) for future in batch]
        versions = [None if t is None or t.hold is None else t.hold.stored.version for t in tickets]
        served, failed = in_parts(versions, run, error)
        self.failed = {batch[place].state.request_id: why for place, why in failed.items()}
        if not served:
            raise error
        (_, output), *rest = served
        output.logits = output.logits.clone()
        of_rows = owners
        if "logits_to_keep" in named:
            of_rows = torch.tensor([i for i, future in enumerate(batch) if future.has_new_token])
        for part, other in rest:
            rows = torch.isin(of_rows, torch.tensor(part)).nonzero()[:, 0].to(ids.device)
            output.logits[:, rows] = other.logits[:, rows]
        return output

    def _run(
        self,
        named: Mapping[str, Any],
        length: int,
        batch: Sequence[FutureRequestState],
        part: Sequence[int] | None = None,
    ) -> Any:
        """The model's output for these arguments, with the adapters of the requests, or of a part
        of them. The session's lock is held."""
        compiled, session = self._compiled, self._compiled._session
        names, tokens = self._tokens(length, batch, part)
        compiled._check_attached()

        def run() -> Any:
            active = session.running._replace(active=True)
            entry = compiled.entry(compiled.model, packed=True)
            return session.note(active, lambda: entry(**named))

        with self._traced():
            return session.call(run, names, tokens=tokens, packed=True)

    def _count(self, batch: Sequence[FutureRequestState]) -> None:
        """Note how many tokens of each adapter are run."""
        for future in batch:
            ticket = ticket_of(future.state)
            if ticket is not None:
                named = BASE if ticket.hold is None else str(ticket.hold.name)
                self._compiled._session.counts.tokens[named] += future.query_length

    def _tokens(
        self, length: int, batch: Sequence[FutureRequestState], part: Sequence[int] | None
    ) -> tuple[list[str], Tensor]:
        """The adapters of the step, or of a part, and which of them each token uses: (1, T), -1 for
        the base and for padding. A part leaves other tokens to the base, or to what is merged into
        it, which then serves nothing else."""
        session = self._compiled._session
        store, merged = session.store, session.base.merged
        places: dict[str, int] = {}
        found: dict[Ticket | None, int] = {None: -1}
        numbers: list[int] = []
        counts: list[int] = []
        for place, future in enumerate(batch):
            ticket, count, state = ticket_of(future.state), future.query_length, future.state
            if part is not None and place not in part:
                absent = -1 if merged is None else places.setdefault(merged.name, len(places))
                numbers += [absent]
                counts += [count]
                continue
            if ticket not in found:
                assert ticket is not None
                hold = ticket.hold
                if hold is None:
                    found[ticket] = -1
                else:
                    found[ticket] = places.setdefault(store.held_name(hold), len(places))
            before = state.inactive(count) if isinstance(state, AdapterRequest) else 0
            numbers += [-1, found[ticket]]
            counts += [before, count - before]
        counts.append(length - sum(counts))
        numbers.append(-1)
        tokens = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        return list(places), tokens[None]


def _owners(counts: Sequence[int], length: int) -> Tensor:
    """Whose each of `length` tokens or keys is, by the request's place in the step; -1 for
    padding. Each request has `counts` of them."""
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return nn.functional.pad(owners, (0, length - len(owners)), value=-1)


def _by_kind(
    kinds: Sequence[str], length: int, masks: Any, others: Mapping[str, Any]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """For each kind of attention what the tokens see, and the mask; see StepCache. The host waits
    for no device."""
    ends_of_tokens: Tensor = others["cu_seq_lens_q"][1:].contiguous()
    device = ends_of_tokens.device
    if device.type not in ATTENDING_DEVICES:
        return [None] * len(kinds), [None] * len(kinds)
    tokens = torch.arange(length, dtype=ends_of_tokens.dtype, device=device)
    request = torch.searchsorted(ends_of_tokens, tokens, right=True)  # padding is behind the last
    seen: list[Tensor | None] = []
    for kind in kinds:
        ends = others["cu_seq_lens_k"][kind].long()
        of_requests = torch.stack([ends[:-1], ends[1:]], 1)
        seen.append(nn.functional.pad(of_requests, (0, 0, 0, 1)).index_select(0, request))
    return seen, [masks if isinstance(masks, Tensor) else masks[kind] for kind in kinds]


def _laid_out(mask: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(mask, Tensor):
        return mask.clone(memory_format=torch.contiguous_format)
    return {kind: _laid_out(of_kind) for kind, of_kind in mask.items()}
