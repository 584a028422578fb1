"""The engine's forward: one packed batch of tokens, each with the slot of its request's adapter.

    batch of the engine   (1, T) ids, positions, mask, rows to read and write, the last tokens
    → slots               (1, T) the adapter of each token
    → compiled forward    as a call with T requests of one token each (`PACKED_DIMS`)

All steps run the same graphs, those with adapters, on contiguous copies of the engine's buffers,
since graphs depend on strides. So do the parts of a failed step (`failures.py`), where tokens of
other requests are copies of one of the part's, with the base, and write nothing into the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.generation.continuous.adapter_requests import AdapterRequest, account_of, hold_of
from lorafx.generation.continuous.attention import ATTENDING_DEVICES
from lorafx.generation.continuous.failures import DEVICE_ERRORS, in_parts
from lorafx.generation.continuous.pages import StepCache
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.requests import Requests

NOT_FINITE = (
    "the logits of its next token are not finite; look for infinite or very large numbers in its "
    "adapter, or give the model a dtype with a larger range"
)


class Step(NamedTuple):
    """One step.

    Attributes:
        batch: its requests, in the order of their tokens.
        named: the arguments of the model.
        order: indices of the requests in `batch`; those with a new token come first.
        last: the index of the last token of each request of `order` before its draft, among all
            tokens.
        scored: the requests in `batch` with tokens whose logits are asked for beside those of the
            last ones, each once for each such token. These logits come last.
    """

    batch: Sequence[FutureRequestState]
    named: Mapping[str, Any]
    order: Sequence[int]
    last: Tensor
    scored: Sequence[int]

    @property
    def length(self) -> int:
        """The number of tokens, with padding."""
        return int(self.named["input_ids"].shape[1])

    def check(self, output: Any, part: Collection[int]) -> None:
        """Raise FloatingPointError if the logits of a request of `part` are not finite. Such values
        in the keys of one request reach the outputs of all, since a mask does not hide them."""
        logits = output.logits[0]
        if "logits_to_keep" not in self.named:
            logits = logits[self.last]
        rows = [row for row, request in enumerate(self.order) if request in part]
        if not logits[rows].amax(-1).isfinite().all():
            raise FloatingPointError(NOT_FINITE)


class PackedForward:
    """The engine calls this in place of the model. `batch` returns the requests of the step, in the
    order of their tokens.

    Attributes:
        pages: the engine's cache; setting it to None frees it.
        failed: the errors of the requests of the last step that failed, by name.
        scored: the logits of the last step that tell the log-probabilities of prompts, by request.
        drafts: the draft of each request of the coming step that has one, by name.
        further: the logits (k, V) of the last step behind the tokens of drafts, by name.
        undo: writes back what the last step, if it had drafts, overwrote (`StepCache.snapshot`).
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
        self.scored: list[tuple[AdapterRequest, Tensor]] = []
        self.drafts: Mapping[str, Sequence[int]] = {}
        self.further: dict[str, Tensor] = {}
        self.undo: Callable[[Tensor | None], None] | None = None

    def _supports_logits_to_keep(self) -> bool:
        """Whether the head can be computed for some tokens only; the engine calls this."""
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
        **kwargs: Any,
    ) -> Any:
        """The model's output for one step. `kwargs` has arguments of flash attention, of which the
        cumulative lengths are used here, and of the engine's handling of logits."""
        session = self._entries.session
        if self.pages is None or self.pages.pages is not cache.cache_tensor:
            self.pages = StepCache(cache)
        masks = _contiguous_copies(attention_mask)
        seen, kind_masks = _by_kind(self.pages.kinds, input_ids.shape[1], masks, kwargs)
        pages = self.pages.step(read_index, write_index, seen, kind_masks)
        named: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": masks,
            "cache": pages,
            "use_cache": False,
            "is_causal": False,
        }
        self.failed, self.scored, self.further = {}, [], {}
        batch = self._batch()
        order = sorted(range(len(batch)), key=lambda index: not batch[index].has_new_token)
        ends = [*accumulate(future.query_length for future in batch)]
        guessed = [len(self.drafts.get(future.state.request_id, ())) for future in batch]
        last = torch.tensor([ends[i] - 1 - guessed[i] for i in order], dtype=torch.int32)
        last = last.to(input_ids.device)
        scored = [
            (index, end - future.query_length + token)
            for index, (future, end) in enumerate(zip(batch, ends, strict=True))
            for token in _unscored(future, guessed[index])
        ]
        tokens = torch.tensor([token for _, token in scored], dtype=torch.int32)
        single = False
        if logits_to_keep is not None:
            kept = nn.functional.pad(last, (0, len(logits_to_keep) - len(batch)))
            kept = torch.cat([kept, tokens.to(kept.device)])
            # A size of one would need its own graph, so a single last token is passed twice.
            single = len(kept) == 1
            named["logits_to_keep"] = kept.repeat(2) if single else kept.clone()
        step = Step(batch, named, order, last, [index for index, _ in scored])
        with session.lock:
            self._count_tokens(batch)
            restore = pages.snapshot() if len(batch) > 1 or self.drafts else None
            self.undo = restore if self.drafts else None
            try:
                output = self._run(step)
                step.check(output, range(len(batch)))
            except DEVICE_ERRORS:
                raise
            except Exception as error:
                if restore is None or len(batch) == 1:
                    raise
                restore(None)
                output = self._run_in_parts(step, restore, error, kwargs["cu_seq_lens_k"])
        if single:
            output.logits = output.logits[:, :1]
        if scored and logits_to_keep is None:
            self._take_scored(step, output.logits[0, tokens.long()])
        elif scored:
            self._take_scored(step, output.logits[0, -len(scored) :])
            output.logits = output.logits[:, : -len(scored)]
        return output

    def _take_scored(self, step: Step, logits: Tensor) -> None:
        counts = Counter(step.scored)
        for index, rows in zip(counts, logits.split([*counts.values()]), strict=True):
            state: Any = step.batch[index].state
            if state.request_id in self.drafts:
                self.further[state.request_id] = rows
            else:
                self.scored.append((state, rows))

    def _run_in_parts(
        self,
        step: Step,
        restore: Callable[[Tensor | None], None],
        error: Exception,
        key_counts: Mapping[str, Tensor],
    ) -> Any:
        """The model's output for a step that failed as a whole with `error`. Sets `failed`. Raises
        `error` if all of its requests fail."""
        batch, named = step.batch, step.named
        ids: Tensor = named["input_ids"]
        cache: StepCache = named["cache"]
        owners = _owners([future.query_length for future in batch], step.length)
        key_owners = [
            _owners(key_counts[kind].diff().tolist(), rows.shape[0])
            for kind, rows in zip(cache.kinds, cache.read, strict=True)
        ]

        def run(part: Sequence[int]) -> Any:
            kept = torch.tensor(part)
            missing, *keys = (~torch.isin(o, kept).to(ids.device) for o in (owners, *key_owners))
            first = int(missing.long().argmin())
            changed: dict[str, Any] = {
                name: torch.where(missing, named[name][..., first : first + 1], named[name])
                for name in ("input_ids", "position_ids")
            }
            changed["cache"] = cache.without(missing, keys)
            part_step = step._replace(named={**named, **changed})
            try:
                output = self._run(part_step, part)
                part_step.check(output, part)
                return output
            except Exception:
                restore(~missing)
                raise

        holds = [hold_of(future.state) for future in batch]
        versions = [None if hold is None else hold.stored.version for hold in holds]
        served, failed = in_parts(versions, run, error)
        self.failed = {batch[index].state.request_id: reason for index, reason in failed.items()}
        if not served:
            raise error
        (_, output), *further = served
        output.logits = output.logits.clone()
        logit_owners = owners
        if "logits_to_keep" in named:
            logit_owners = torch.tensor([*step.order, *step.scored])
        for part, part_output in further:
            rows = torch.isin(logit_owners, torch.tensor(part)).nonzero()[:, 0].to(ids.device)
            output.logits[:, rows] = part_output.logits[:, rows]
        return output

    def _run(self, step: Step, part: Sequence[int] | None = None) -> Any:
        """The model's output for a step, with the adapters of its requests, or of a part of them.
        The caller holds the session's lock."""
        entries, session = self._entries, self._entries.session
        names, tokens = self._token_adapters(step, part)
        entries.check_attached()

        def find() -> Callable[..., Any]:
            active = session.running._replace(active=True)
            forward = entries.whole(entries.of(entries.model, packed=True))
            return partial(session.note, active, partial(forward, **step.named))

        return session.call(find, Requests(tuple(names), tokens, packed=True))

    def _count_tokens(self, batch: Sequence[FutureRequestState]) -> None:
        tokens = self._entries.session.counts.tokens
        for future in batch:
            if isinstance(future.state, AdapterRequest):
                tokens[account_of(future.state)] += future.query_length

    def _token_adapters(self, step: Step, part: Sequence[int] | None) -> tuple[list[str], Tensor]:
        """The adapters of the step, or of a part of it, and the index of each token's adapter among
        them: (1, T), -1 for the base and for padding. Tokens outside the part use the base, or the
        merged adapter, since a merged model serves no other."""
        merged = self._entries.session.base.merged
        indices: dict[str, int] = {}
        of_spans: list[int] = []
        counts: list[int] = []
        for request, future in enumerate(step.batch):
            state, count = future.state, future.query_length
            name, before, hold = None, 0, hold_of(state)
            if part is not None and request not in part:
                name = None if merged is None else merged.name
            elif isinstance(state, AdapterRequest):
                name = None if hold is None else hold.name
                before = state.inactive(count)
            of_spans += [-1, -1 if name is None else indices.setdefault(name, len(indices))]
            counts += [before, count - before]
        counts.append(step.length - sum(counts))
        of_spans.append(-1)
        tokens = torch.tensor(of_spans).repeat_interleave(torch.tensor(counts))
        return list(indices), tokens[None]


def _owners(counts: Sequence[int], length: int) -> Tensor:
    """The request of each of `length` tokens or keys, (length,), where request i has counts[i] of
    them; -1 for padding."""
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return nn.functional.pad(owners, (0, length - len(owners)), value=-1)


def _unscored(future: FutureRequestState, guessed: int) -> range:
    """The tokens of a request in the step whose logits its draft of `guessed` tokens, or its
    prompt's log-probabilities, need."""
    state = future.state
    if guessed:
        return range(future.query_length - guessed, future.query_length)
    if isinstance(state, AdapterRequest) and state.scoring:
        return state.unscored(future.query_length)
    return range(0)


def _by_kind(
    kinds: Sequence[str], length: int, masks: Any, cumulative: Mapping[str, Any]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """`seen` and `masks` of StepCache, computed without synchronizing with the device from the
    `cumulative` lengths."""
    ends_of_tokens: Tensor = cumulative["cu_seq_lens_q"][1:].contiguous()
    device = ends_of_tokens.device
    if device.type not in ATTENDING_DEVICES:
        return [None] * len(kinds), [None] * len(kinds)
    tokens = torch.arange(length, dtype=ends_of_tokens.dtype, device=device)
    request = torch.searchsorted(ends_of_tokens, tokens, right=True)  # padding is behind the last
    seen: list[Tensor | None] = []
    for kind in kinds:
        ends = cumulative["cu_seq_lens_k"][kind].long()
        of_requests = torch.stack([ends[:-1], ends[1:]], 1)
        seen.append(nn.functional.pad(of_requests, (0, 0, 0, 1)).index_select(0, request))
    return seen, [masks if isinstance(masks, Tensor) else masks[kind] for kind in kinds]


def _contiguous_copies(mask: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(mask, Tensor):
        return mask.clone(memory_format=torch.contiguous_format)
    return {kind: _contiguous_copies(kind_mask) for kind, kind_mask in mask.items()}
