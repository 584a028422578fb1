"""Merging one adapter into the base weights, and taking it out again.

    merge      W' = round(W + ΔW)      summed in float32, rounded once to the weight's dtype
    unmerge    W                        the very bits, from copies that were kept in host memory

A merged model runs the base model's own graphs, which take the weights as inputs: nothing is
captured again, and addresses stay what they were. Rounding cannot be undone by subtracting ΔW, so
the originals of what was changed are kept: as many bytes of host memory as those weights have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafx.base_weights.changes import Change, changes_of, copied, not_mergeable
from lorafx.base_weights.deltas import Delta, blocks, computing
from lorafx.errors import BatchError, CaptureError, ConfigError, MatchError
from lorafx.graph.derived import Holder
from lorafx.progress import progress

if TYPE_CHECKING:
    from lorafx.serving.session import Session


@dataclass(frozen=True)
class MergedWeight:
    """One base weight that holds W + ΔW.

    Attributes:
        name: path and attribute.
        nbytes: of the weight.
        error: ‖(W' − W) − ΔW‖ / ‖ΔW‖ in the Frobenius norm: how much of the update was lost by
            rounding to the weight's dtype. 0 where ΔW is zero.
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
        host_bytes: host memory that the originals take until `unmerge`.
    """

    adapter: str
    weights: tuple[MergedWeight, ...]
    host_bytes: int

    @property
    def error(self) -> float:
        """The largest error of a weight."""
        return max((weight.error for weight in self.weights), default=0.0)

    def __str__(self) -> str:
        return (
            f"{self.adapter}: merged into {len(self.weights)} weights, rounding lost at most "
            f"{self.error:.1e} of an update, {self.host_bytes} bytes of originals in host memory"
        )


@dataclass(frozen=True, eq=False)
class _Original:
    """A tensor as it was: where it is held, its numbers in host memory, and its version when it
    had been written (None where torch counts none)."""

    holder: Holder
    tensor: Tensor
    numbers: Tensor
    version: int | None = None

    @classmethod
    def of(cls, holder: Holder, tensor: Tensor) -> _Original:
        return cls(holder, tensor, tensor.detach().to("cpu", copy=True))

    def written(self) -> _Original:
        """As after the last write of ours."""
        return _Original(self.holder, self.tensor, self.numbers, version_of(self.tensor))

    def restore(self) -> None:
        write(self.tensor, self.numbers)

    @property
    def touched(self) -> bool:
        """Whether somebody else has written or replaced the tensor since."""
        return self.holder.tensor is not self.tensor or version_of(self.tensor) != self.version


@dataclass(frozen=True, eq=False)
class Merged:
    """The adapter that the base weights hold, and what they were before."""

    report: MergeReport
    originals: tuple[_Original, ...]

    @property
    def name(self) -> str:
        return self.report.adapter


def merge(session: Session, name: str) -> MergeReport:
    """See `CompiledModel.merge`."""
    with session.lock, session.weights_lock:
        _refuse_in_use(session, name)
        changes = changes_of(session.program, session.store, name)
        apart = [_tied_apart(change) for change in changes if change.tied_apart]
        if apart:
            raise not_mergeable(name, apart)
        with progress(f"merging {name} into {len(changes)} weights"):
            session.merged = _merged(name, changes)
        return session.merged.report


def unmerge(session: Session, *, force: bool = False) -> None:
    """See `CompiledModel.unmerge`."""
    with session.lock, session.weights_lock:
        merged = session.merged
        if merged is None:
            raise ConfigError("no adapter is merged; merge(name) one first")
        if session.depth:
            raise BatchError(f"a call is running that {merged.name!r} serves; unmerge() after it")
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
            for item in merged.originals:
                if item.holder.tensor is item.tensor:
                    item.restore()
        session.merged = None


@contextmanager
def unmerged(session: Session) -> Iterator[None]:
    """The base's own weights inside the block; what was merged is merged into what they are then.

    For whatever writes base weights. Nothing happens where no adapter is merged.

    Raises:
        BatchError: a call is running.
        CaptureError: weights were written by somebody else since the merge.
        MatchError: at the end, where ΔW does not fit any more: nothing is merged then.
    """
    with session.lock, session.weights_lock:
        merged = session.merged
        if merged is None:
            yield
            return
        unmerge(session)
        try:
            yield
        finally:
            merge(session, merged.name)


def _refuse_in_use(session: Session, name: str) -> None:
    session.store[name]  # UnknownAdapterError
    if session.merged is not None:
        also = " already" if session.merged.name == name else ""
        raise ConfigError(
            f"{session.merged.name!r} is merged{also}"
            + ("" if also else f"; unmerge() it before {name!r} is merged")
        )
    if session.depth:
        raise BatchError(f"a call is running; merge {name!r} after it")
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


def _merged(name: str, changes: Sequence[Change]) -> Merged:
    """Write W + ΔW into every weight; all are as before when one fails."""
    originals: list[_Original] = []
    weights: list[MergedWeight] = []
    try:
        for change in changes:
            originals.append(_Original.of(change.holder, change.weight))
            error = add_to(change.weight, change.weight, change.delta, str(change.holder))
            weights.append(MergedWeight(str(change.holder), change.weight.nbytes, error))
            for copy in change.copies:
                originals.append(_Original.of(copy.holder, copy.tensor))
                write(copy.tensor, copied(_dense(change), copy))
    except BaseException:
        for item in originals:
            item.restore()
        raise
    kept = tuple(item.written() for item in originals)
    size = sum(item.numbers.nbytes for item in kept)
    return Merged(MergeReport(name, tuple(weights), size), kept)


def _dense(change: Change) -> Tensor:
    """W (N, K) of a linear."""
    weight = change.weight.detach()
    return weight.T if change.delta.site.eligible.transposed else weight


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
    like = torch.empty(0, dtype=dtype, device=weight.device)
    for start, stop in blocks(weight.shape):
        update = delta.block(start, stop, like)
        before = weight.detach()[start:stop].to(dtype, copy=True)
        after = (before + update).to(weight.dtype)
        overflown = (~torch.isfinite(after) & torch.isfinite(before)).any()
        difference = torch.linalg.vector_norm(after.to(dtype) - before - update)
        numbers = torch.stack([overflown.to(dtype), difference, torch.linalg.vector_norm(update)])
        bad, block_lost, block_whole = numbers.tolist()  # one transfer a block
        if bad:
            raise MatchError(f"{label}: W + ΔW is beyond the range of {weight.dtype}")
        lost, whole = lost + block_lost**2, whole + block_whole**2
        write(target.detach()[start:stop], after)
    return (lost / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Write in place. Tensors of inference mode may be written in that mode alone."""
    with torch.inference_mode(target.is_inference()):
        target.detach().copy_(value)


def version_of(tensor: Tensor) -> int | None:
    """How often torch has seen it written; None for tensors of inference mode, which count none."""
    return None if tensor.is_inference() else tensor._version
