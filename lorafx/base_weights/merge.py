"""Merging one adapter into the base weights, and taking it out again.

    merge      W' = round(W + ΔW)      summed in float32, rounded once to the weight's dtype
    unmerge    W                        the very bits, from copies that were kept in host memory

A merged model runs the base model's own graphs, which take the weights as inputs: nothing is
captured again, and addresses stay what they were. Rounding cannot be undone by subtracting ΔW, so
the originals of what was changed are kept: as many bytes of host memory as those weights have.
Quantised weights are changed through their own format, where that is asked for; how much of ΔW the
format loses is reported, and what they were is kept where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafx.base_weights.changes import (
    Change,
    Changes,
    Copy,
    StoredChange,
    changes_of,
    copied,
    not_mergeable,
)
from lorafx.base_weights.deltas import Delta, blocks, computing
from lorafx.errors import CaptureError, ConfigError, LorafxError, MatchError
from lorafx.graph.derived import Holder
from lorafx.model.module_graph import writing
from lorafx.model.packing import check_packed
from lorafx.model.quantized import Stored, dequantize, requantize
from lorafx.model.weight_formats import format_of, own_tensors
from lorafx.progress import progress

if TYPE_CHECKING:
    from lorafx.serving.session import Session

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class MergedWeight:
    """One base weight that holds W + ΔW.

    Attributes:
        name: path and attribute.
        nbytes: of the weight.
        error: ‖(W' − W) − ΔW‖ / ‖ΔW‖ in the Frobenius norm: how much of the update was lost by
            rounding to the weight's dtype, or to the format it is quantised to. 0 where ΔW is zero.
    """

    name: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        adapter: the adapter's name.
        weights: what holds W + ΔW, in the order of the model's sites.
        original_bytes: memory that the originals take until `unmerge`: the host's, and for
            quantised weights that of their device.
    """

    adapter: str
    weights: tuple[MergedWeight, ...]
    original_bytes: int

    @property
    def error(self) -> float:
        """The largest error of a weight."""
        return max((weight.error for weight in self.weights), default=0.0)

    def __str__(self) -> str:
        return (
            f"{self.adapter}: merged into {len(self.weights)} weights, rounding lost at most "
            f"{self.error:.1e} of an update, {self.original_bytes} bytes of originals are kept"
        )


@dataclass(frozen=True, eq=False)
class _Original:
    """A tensor as it was: where it is held, its numbers in host memory, and what it looked like
    when it had been written."""

    holder: Holder
    tensor: Tensor
    numbers: Tensor
    mark: int | None = None

    @classmethod
    def of(cls, holder: Holder, tensor: Tensor) -> _Original:
        return cls(holder, tensor, tensor.detach().to("cpu", copy=True))

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes

    @property
    def touched(self) -> bool:
        """Whether somebody else has written or replaced the tensor since."""
        return self.holder.tensor is not self.tensor or mark_of(self.tensor) != self.mark

    def written(self) -> _Original:
        """As after the last write of ours."""
        return _Original(self.holder, self.tensor, self.numbers, mark_of(self.tensor))

    def restore(self) -> None:
        write(self.tensor, self.numbers)


class _StoredOriginal:
    """A quantised weight as it was."""

    touched = False  # formats do not tell

    def __init__(self, holder: Holder, parameter: str | None) -> None:
        self.holder = holder
        self._stored = Stored(holder.module, parameter)
        kept = format_of(holder.module, holder.attribute)
        held = own_tensors(holder.module)
        if kept is not None:
            held = kept.tensors(holder.module, holder.attribute)
        self.nbytes = sum(tensor.nbytes for tensor in held)

    def written(self) -> _StoredOriginal:
        return self

    def restore(self) -> None:
        self._stored.restore()


@dataclass(frozen=True, eq=False)
class Merged:
    """The adapter that the base weights hold, and what they were before."""

    report: MergeReport
    requantize: bool
    originals: tuple[_Original | _StoredOriginal, ...]

    @property
    def name(self) -> str:
        return self.report.adapter


def merge(session: Session, name: str, *, requantize: bool = False) -> MergeReport:
    """See `CompiledModel.merge`."""
    session.refuse_running(f"merge {name!r}")
    with session.weights_lock, session.lock:
        _refuse_in_use(session, name)
        session.program.look_at_modules()
        session.program.refuse_missing()
        check_packed(session.program.packed)
        changes = changes_of(session.program, session.store, name, requantize=requantize)
        apart = [_tied_apart(change) for change in changes.plain if change.tied_apart]
        if apart:
            raise not_mergeable(name, apart)
        with progress(f"merging {name} into {len(changes.plain) + len(changes.stored)} weights"):
            session.merged = _merged(name, changes, requantize=requantize)
        session.unmerged = ""
        return session.merged.report


def unmerge(session: Session, *, force: bool = False) -> None:
    """See `CompiledModel.unmerge`."""
    session.refuse_running("unmerge()")
    with session.weights_lock, session.lock:
        merged = session.merged
        if merged is None:
            if not session.unmerged:
                raise ConfigError("no adapter is merged; merge(name) one first")
            session.unmerged = ""
            return
        touched = [str(item.holder) for item in merged.originals if item.touched]
        if touched and not force:
            more = f" and {len(touched) - 3} more" if len(touched) > 3 else ""
            raise CaptureError(
                f"{', '.join(touched[:3])}{more}: written or replaced since {merged.name!r} was "
                "merged, and restoring would undo that. Change base weights by load_weights(), "
                "which keeps the merge in step; or call unmerge(force=True), which puts the "
                "originals back all the same, and load the weights again"
            )
        with progress(f"taking {merged.name} out of {len(merged.report.weights)} weights"):
            for item in reversed(merged.originals):
                if isinstance(item, _StoredOriginal) or item.holder.tensor is item.tensor:
                    item.restore()
        session.merged = None


@contextmanager
def unmerged(session: Session) -> Iterator[None]:
    """The base's own weights inside the block; what was merged is merged into what they are then.

    For whatever writes base weights. Nothing happens where no adapter is merged.

    Raises:
        BatchError: a call is running.
        CaptureError: weights were written by somebody else since the merge.
        MatchError: at the end, where ΔW does not fit any more. Nothing is merged then, and calls
            are refused until `merge` or `unmerge`, since without a name they would be the base's.
    """
    with session.weights_lock, session.lock:
        merged = session.merged
        if merged is None:
            yield
            return
        unmerge(session)
        try:
            yield
        except BaseException:
            with suppress(LorafxError):  # calls are refused and say why; the cause is the other one
                _merge_again(session, merged)
            raise
        _merge_again(session, merged)


def _merge_again(session: Session, merged: Merged) -> None:
    try:
        merge(session, merged.name, requantize=merged.requantize)
    except BaseException as error:
        session.unmerged = (
            f"{merged.name!r} was merged, and could not be merged again after an update of the "
            f"base weights: {error}. merge() an adapter, or unmerge() to serve adapters and the "
            "new base side by side"
        )
        if isinstance(error, LorafxError):
            raise type(error)(session.unmerged) from error
        raise


def _refuse_in_use(session: Session, name: str) -> None:
    session.store[name]  # UnknownAdapterError
    if session.merged is not None:
        also = " already" if session.merged.name == name else ""
        raise ConfigError(
            f"{session.merged.name!r} is merged{also}"
            + ("" if also else f"; unmerge() it before {name!r} is merged")
        )
    if session.default not in (None, name):
        raise ConfigError(
            f"{session.default!r} is in use: it serves the calls that name no adapter. "
            f"set_adapter({name!r}) or set_adapter(None) before {name!r} is merged"
        )


def _tied_apart(change: Change) -> str:
    ends = ", ".join(str(holder) for holder, _ in change.ends)
    changed = [str(holder) for holder, delta in change.ends if delta is not None]
    return (
        f"{ends} are one tensor, of which the adapter changes {', '.join(changed)} alone or each "
        "end in its own way; export_merged() writes them as two"
    )


def _merged(name: str, changes: Changes, *, requantize: bool) -> Merged:
    """Write W + ΔW into every weight; all are as before when one fails."""
    originals: list[_Original | _StoredOriginal] = []
    weights: list[MergedWeight] = []

    def follow(copies: Sequence[Copy], dense: Tensor) -> None:
        for copy in copies:
            originals.append(_Original.of(copy.holder, copy.tensor))
            write(copy.tensor, copied(dense, copy))

    try:
        for change in changes.plain:
            kept = _Original.of(change.holder, change.weight)
            originals.append(kept)
            error = add_to(change.weight, change.weight, change.delta, str(change.holder))
            weights.append(MergedWeight(str(change.holder), kept.nbytes, error))
            turned = change.delta.site.eligible.transposed
            follow(change.copies, change.weight.detach().mT if turned else change.weight.detach())
        for stored in changes.stored:
            held = _StoredOriginal(stored.holder, _parameter(stored))
            originals.append(held)
            weights.append(MergedWeight(str(stored.holder), held.nbytes, _requantized(stored)))
            if stored.copies:
                follow(stored.copies, dequantize(stored.holder.module, _parameter(stored)))
    except BaseException:
        for item in reversed(originals):
            item.restore()
        raise
    ours = tuple(item.written() for item in originals)
    report = MergeReport(name, tuple(weights), sum(item.nbytes for item in ours))
    return Merged(report, requantize, ours)


def _parameter(change: StoredChange) -> str | None:
    """What `dequantize` is asked for: one of several weights of a module by its name."""
    return None if change.delta.site.expert_weight is None else change.holder.attribute


@torch.no_grad()
def _requantized(change: StoredChange) -> float:
    """Store W + ΔW in the weight's own format; what of ΔW is lost.

    Raises:
        MatchError: the format cannot be read or written.
    """
    module, parameter = change.holder.module, _parameter(change)
    try:
        before = dequantize(module, parameter).float()
        turned = change.delta.site.eligible.transposed and parameter is None
        stored = before.mT if turned else before
        update = change.delta.update(0, change.delta.shape[0], stored)
        if turned:
            update = update.mT
        if update.shape != before.shape:
            raise ConfigError(
                f"it is dequantised to {tuple(before.shape)}, ΔW {change.delta.shape}"
            )
        wanted = before + update
        requantize(module, wanted, parameter)
        after = dequantize(module, parameter).float()
    except ConfigError as error:
        raise MatchError(f"{change.holder}: {error}; nothing is merged") from error
    whole = float(torch.linalg.vector_norm(update))
    return float(torch.linalg.vector_norm(after - wanted)) / whole if whole else 0.0


@torch.no_grad()
def add_to(target: Tensor, weight: Tensor, delta: Delta, label: str) -> float:
    """target ← round(weight + ΔW), a few rows at a time; `target` may be the weight.

    Returns:
        ‖(target − weight) − ΔW‖ / ‖ΔW‖.

    Raises:
        MatchError: a sum is beyond the range of the dtype; `target` is written in part then.
    """
    dtype = computing(weight)
    lost = whole = 0.0
    for start, stop in blocks(weight.shape, weight.device):
        before = weight.detach()[start:stop].to(dtype, copy=True)
        update = delta.update(start, stop, before)
        after = (before + update).to(weight.dtype)
        wrong = after.to(dtype, copy=True).sub_(before).sub_(update)
        norms = torch.stack([torch.linalg.vector_norm(wrong), torch.linalg.vector_norm(update)])
        block_lost, block_whole = norms.tolist()  # one transfer a block
        if not math.isfinite(block_lost) and _overflown(before, after):
            raise MatchError(
                f"{label}: W + ΔW is beyond the range of {weight.dtype}; nothing is merged"
            )
        lost, whole = lost + block_lost**2, whole + block_whole**2
        write(target.detach()[start:stop], after)
    return (lost / whole) ** 0.5 if whole else 0.0


def _overflown(before: Tensor, after: Tensor) -> bool:
    """Whether finite numbers have become infinite, or none."""
    return bool((~torch.isfinite(after) & torch.isfinite(before)).any())


def write(target: Tensor, value: Tensor) -> None:
    """Write in place."""
    with writing(target):
        target.detach().copy_(value)


@torch.no_grad()
def mark_of(tensor: Tensor) -> int:
    """A sum over the bits of all numbers, which changes with any one of them, but not where numbers
    change places. torch's own count of writes misses those through `.data`, and tensors of
    inference mode have none."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    words = 8 // bits.element_size()
    if bits.is_contiguous() and not bits.numel() % words and not bits.storage_offset() % words:
        bits = bits.reshape(-1).view(torch.int64)  # summed as it is: much faster than widened
    return int(bits.sum(dtype=torch.int64))
