"""The engine's forward: one packed batch of tokens, each with the slot of its request's adapter.

    batch of the engine   (1, T) ids, positions, mask, where to read and write, the last tokens
    → slots               (1, T) which adapter each token uses
    → compiled forward    as a call with T requests of one token each (`PACKED_DIMS`)

All steps run the same graphs, those with adapters, on copies of the engine's buffers: graphs depend
on how tensors lie. So do the parts of a step that fails (`failures.py`): tokens of other requests
are copies of one of the part's, of the base, and write nothing into the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.adapter_store.names import BASE
from lorafx.generation.continuous.adapter_requests import AdapterRequest, hold_of
from lorafx.generation.continuous.attention import ATTENDING_DEVICES, StepCache
from lorafx.generation.continuous.failures import OF_THE_DEVICE, in_parts
from lorafx.runtime.entry import CompiledForwards
from lorafx.runtime.requests import Requests


class Step(NamedTuple):
    """One step.

    Attributes:
        batch: its requests, in the order of their tokens.
        named: what the model is called with.
        places: those of the requests in the batch, with a new token first.
        last: the places of their last tokens among all tokens.
    """

    batch: Sequence[FutureRequestState]
    named: Mapping[str, Any]
    places: Sequence[int]
    last: Tensor

    @property
    def length(self) -> int:
        """The number of tokens, with padding."""
        return int(self.named["input_ids"].shape[1])

    def check(self, output: Any, part: Collection[int]) -> None:
        """Raise FloatingPointError where the logits of a request of `part` are not finite. In the
        keys of one request that reaches the output of all, masked or not."""
        logits = output.logits[0]
        if "logits_to_keep" not in self.named:
            logits = logits[self.last]
        rows = [row for row, place in enumerate(self.places) if place in part]
        if not logits[rows].amax(-1).isfinite().all():
            raise FloatingPointError(
                "the logits of its next token are not finite; look for infinite or very large "
                "numbers in its adapter, or give the model a dtype with a larger range"
            )


class PackedForward:
    """Called by the engine in place of the model. `batch` gives the requests of the step, in the
    order of their tokens.

    Attributes:
        pages: the engine's cache, which may be let go of by None.
        failed: the requests of the last step that failed, by their names, and why.
    """

    def __init__(
        self,
        entries: CompiledForwards,
        batch: Callable[[], list[FutureRequestState]],
    ) -> None:
        self._entries = entries
        self._batch = batch
        self.pages: StepCache | None = None
        self.failed: dict[str, Exception] = {}

    def _supports_logits_to_keep(self) -> bool:
        """Asked by the engine: whether the head is only computed for tokens that need it."""
        supports = getattr(self._entries.model, "_supports_logits_to_keep", None)
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
        session = self._entries.session
        if self.pages is None or self.pages.pages is not cache.cache_tensor:
            self.pages = StepCache(cache)
        masks = _laid_out(attention_mask)
        seen, of_kinds = _by_kind(self.pages.kinds, input_ids.shape[1], masks, others)
        pages = self.pages.step(read_index, write_index, seen, of_kinds)
        named: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": masks,
            "cache": pages,
            "use_cache": False,
            "is_causal": False,
        }
        # Sizes of one have graphs of their own: a single last token is asked for twice.
        single = logits_to_keep is not None and logits_to_keep.shape[0] == 1
        self.failed = {}
        batch = self._batch()
        places = sorted(range(len(batch)), key=lambda place: not batch[place].has_new_token)
        ends = [*accumulate(future.query_length for future in batch)]
        last = torch.tensor([ends[place] - 1 for place in places], dtype=torch.int32)
        last = last.to(input_ids.device)
        if logits_to_keep is not None:
            logits_to_keep = nn.functional.pad(last, (0, len(logits_to_keep) - len(batch)))
            named["logits_to_keep"] = logits_to_keep.repeat(2) if single else logits_to_keep.clone()
        step = Step(batch, named, places, last)
        with session.lock:
            self._count(batch)
            put_back = pages.kept() if len(batch) > 1 else None
            try:
                output = self._run(step)
                step.check(output, range(len(batch)))
            except OF_THE_DEVICE:
                raise
            except Exception as error:
                if put_back is None:
                    raise
                put_back(None)
                output = self._in_parts(step, put_back, error, others["cu_seq_lens_k"])
        if single:
            output.logits = output.logits[:, :1]
        return output

    def _in_parts(
        self,
        step: Step,
        put_back: Callable[[Tensor | None], None],
        error: Exception,
        key_counts: Mapping[str, Tensor],
    ) -> Any:
        """The model's output for a step that failed with `error` as a whole, which is raised where
        all of its requests fail. Notes which do."""
        batch, named = step.batch, step.named
        ids: Tensor = named["input_ids"]
        cache: StepCache = named["cache"]
        owners = _owners([future.query_length for future in batch], step.length)
        of_keys = [
            _owners(key_counts[kind].diff().tolist(), rows.shape[0])
            for kind, rows in zip(cache.kinds, cache.read, strict=True)
        ]

        def run(part: Sequence[int]) -> Any:
            missing, *keys = (
                ~torch.isin(rows, torch.tensor(part)).to(ids.device) for rows in (owners, *of_keys)
            )
            first = int(missing.long().argmin())
            changed: dict[str, Any] = {
                name: torch.where(missing, named[name][..., first : first + 1], named[name])
                for name in ("input_ids", "position_ids")
            }
            changed["cache"] = cache.without(missing, keys)
            of_part = step._replace(named={**named, **changed})
            try:
                output = self._run(of_part, part)
                of_part.check(output, part)
                return output
            except Exception:
                put_back(~missing)
                raise

        holds = [hold_of(future.state) for future in batch]
        versions = [None if hold is None else hold.stored.version for hold in holds]
        served, failed = in_parts(versions, run, error)
        self.failed = {batch[place].state.request_id: why for place, why in failed.items()}
        if not served:
            raise error
        (_, output), *rest = served
        output.logits = output.logits.clone()
        of_logits = owners
        if "logits_to_keep" in named:
            of_logits = torch.tensor([i for i, future in enumerate(batch) if future.has_new_token])
        for part, other in rest:
            rows = torch.isin(of_logits, torch.tensor(part)).nonzero()[:, 0].to(ids.device)
            output.logits[:, rows] = other.logits[:, rows]
        return output

    def _run(self, step: Step, part: Sequence[int] | None = None) -> Any:
        """The model's output for a step, with the adapters of its requests, or of a part of them.
        The session's lock is held."""
        entries, session = self._entries, self._entries.session
        names, tokens = self._tokens(step, part)
        entries.check_attached()

        def run() -> Any:
            active = session.running._replace(active=True)
            entry = entries.of(entries.model, packed=True)
            return session.note(active, lambda: entry(**step.named))

        return session.call(run, Requests(tuple(names), tokens, packed=True))

    def _count(self, batch: Sequence[FutureRequestState]) -> None:
        """Note how many tokens of each adapter are run."""
        tokens = self._entries.session.counts.tokens
        for future in batch:
            if isinstance(future.state, AdapterRequest):
                hold = future.state.hold
                tokens[BASE if hold is None else str(hold.stored.name)] += future.query_length

    def _tokens(self, step: Step, part: Sequence[int] | None) -> tuple[list[str], Tensor]:
        """The adapters of the step, or of a part, and which of them each token uses: (1, T), -1 for
        the base and for padding. A part leaves other tokens to the base, or to what is merged into
        it, which then serves nothing else."""
        merged = self._entries.session.base.merged
        places: dict[str, int] = {}
        numbers: list[int] = []
        counts: list[int] = []
        for place, future in enumerate(step.batch):
            state, count = future.state, future.query_length
            name, before, hold = None, 0, hold_of(state)
            if part is not None and place not in part:
                name = None if merged is None else merged.name
            elif isinstance(state, AdapterRequest):
                name = None if hold is None else hold.name
                before = state.inactive(count)
            numbers += [-1, -1 if name is None else places.setdefault(name, len(places))]
            counts += [before, count - before]
        counts.append(step.length - sum(counts))
        numbers.append(-1)
        tokens = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        return list(places), tokens[None]


def _owners(counts: Sequence[int], length: int) -> Tensor:
    """Whose each of `length` tokens or keys is, of which each request has `counts`; -1 for
    padding."""
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
