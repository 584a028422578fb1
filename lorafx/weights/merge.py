"""Merges one adapter into the base weights, and restores them.

    merge      W' = round(W + ΔW)      summed in float32, rounded once to the weight's dtype
    unmerge    W                        bit by bit, from copies in host memory

A merged model runs the base model's own graphs, which take the weights as inputs: nothing is
captured again. The copies take as many bytes of host memory as the changed weights; those of
quantised weights stay on their device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lorafx.adapter_store.stored import Kept
from lorafx.errors import CaptureError, ConfigError, MatchError, some
from lorafx.interrupts import Rollback, undisturbed
from lorafx.model.module_graph import Holder
from lorafx.model.packing import check_packed
from lorafx.model.quantized import dequantize, requantize, stored
from lorafx.model.weight_formats import own_tensors
from lorafx.progress import progress
from lorafx.runtime.running import BaseState
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import places_in_other_models
from lorafx.weights.changes import Change, changes_of, not_mergeable
from lorafx.weights.copies import outdated_copies
from lorafx.weights.delta import add_to, checksum, write


@dataclass(frozen=True)
class MergedWeight:
    """One base weight that holds W + ΔW.

    Attributes:
        name: path and attribute.
        error: ‖(W' − W) − ΔW‖ / ‖ΔW‖ in the Frobenius norm: the part of the update that rounding to
            the weight's dtype or quantised format has lost. 0 if ΔW is zero.
    """

    name: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        weights: the weights that hold W + ΔW, in the order of the model's sites.
        original_bytes: memory that the originals take until `unmerge`.
    """

    adapter: str
    weights: tuple[MergedWeight, ...]
    original_bytes: int

    @property
    def error(self) -> float:
        return max((weight.error for weight in self.weights), default=0.0)

    def __str__(self) -> str:
        return (
            f"{self.adapter}: merged into {len(self.weights)} weights; rounding lost at "
            f"most {self.error:.1e} of a weight's update; {self.original_bytes} bytes of "
            "originals are kept"
        )


@dataclass(frozen=True, eq=False)
class Original:
    """A weight before the merge: `tensor`, and its `checksum` after the merge. Both are None for a
    weight in a format, where later writes by others cannot be detected."""

    holder: Holder
    tensor: Tensor | None
    nbytes: int
    restore: Callable[[], None]
    checksum: int | None = None

    @classmethod
    def of(cls, holder: Holder, tensor: Tensor) -> Original:
        numbers = tensor.detach().to("cpu", copy=True)
        return cls(holder, tensor, numbers.nbytes, partial(write, tensor, numbers))

    @classmethod
    def of_format(cls, holder: Holder, parameter: str | None) -> Original:
        return cls(holder, None, *stored(holder.module, parameter))

    @property
    def in_place(self) -> bool:
        return self.tensor is None or self.holder.local is self.tensor

    @property
    def touched(self) -> bool:
        """Whether anything else has written or replaced the tensor since the merge."""
        tensor = self.tensor
        return tensor is not None and not (self.in_place and checksum(tensor) == self.checksum)

    def with_checksum(self) -> Original:
        return self if self.tensor is None else replace(self, checksum=checksum(self.tensor))


@dataclass(frozen=True, eq=False)
class Merged:
    """The adapter that the base weights hold, and their originals."""

    report: MergeReport
    originals: tuple[Original, ...]
    kept: Kept

    @property
    def name(self) -> str:
        return self.report.adapter


_INTERRUPTED = (
    "a merge or unmerge was cut short, and the base weights hold a part of the adapter; "
    "call unmerge(force=True), or load_weights with all of them"
)


def merge(session: Session, name: str, *, requantize: bool = False) -> MergeReport:
    session.refuse_running(f"merge {name!r}")
    kept = session.store.fetch([name], resident=True)
    with session.weights_lock, session.lock:
        session.locks.streams.follow(session.accelerators)
        session.refuse_broken()
        _refuse_in_use(session, name)
        session.program.look_at_modules()
        session.program.refuse_missing()
        check_packed(session.program.packed)
        kept = session.store.fetch([name], resident=True)
        changes = changes_of(session.program, session.store, name, requantize=requantize)
        _refuse_shared(session, name, changes)
        with progress(f"merging {name} into {len(changes)} weights"):
            return _write_merged(session, name, kept, changes)


def unmerge(session: Session, *, force: bool = False) -> None:
    session.refuse_running("unmerge()")
    with session.weights_lock, session.lock:
        session.locks.streams.follow(session.accelerators)
        merged = merged_of(session)
        if merged is None:
            raise ConfigError("no adapter is merged; call merge(name) first")
        if not force:
            _refuse_touched(merged)
        with progress(f"taking {merged.name} out of {len(merged.report.weights)} weights"):
            undisturbed(lambda: _restore_originals(session, merged))


def merged_of(session: Session) -> Merged | None:
    merged = session.base.merged
    assert merged is None or isinstance(merged, Merged)
    return merged


def _restore_originals(session: Session, merged: Merged) -> None:
    before = session.base
    session.base = before._replace(broken=_INTERRUPTED)
    for item in reversed(merged.originals):
        if item.in_place:
            item.restore()
    session.store.write_changed()  # what got a slot meanwhile was made of merged weights
    broken = "" if before.broken == _INTERRUPTED else before.broken
    session.base = before._replace(merged=None, broken=broken)


def _refuse_touched(merged: Merged) -> None:
    touched = [str(item.holder) for item in merged.originals if item.touched]
    if touched:
        raise CaptureError(
            f"{some(touched)}: something wrote or replaced these weights "
            f"since {merged.name!r} was merged, and restoring the originals would undo "
            "that. Call unmerge(force=True), which puts the originals back anyway, and "
            "load_weights() then"
        )


def _refuse_in_use(session: Session, name: str) -> None:
    session.store[name]  # UnknownAdapterError
    merged = session.base.merged
    if merged is not None:
        also = " already" if merged.name == name else ""
        raise ConfigError(
            f"{merged.name!r} is merged{also}"
            + ("" if also else f"; call unmerge() before merging {name!r}")
        )
    if session.default not in (None, name):
        raise ConfigError(
            f"{session.default!r} is in use: it serves the calls that name no adapter. "
            f"set_adapter({name!r}) or set_adapter(None) before {name!r} is merged"
        )


def _refuse_shared(session: Session, name: str, changes: Sequence[Change]) -> None:
    holders = [holder for c in changes for holder in (c.holder, *(end for end, _ in c.ends))]
    problems = outdated_copies(session.program, holders)
    for change in changes:
        if change.tied_apart:
            ends = ", ".join(str(holder) for holder, _ in change.ends)
            changed = [str(holder) for holder, delta in change.ends if delta is not None]
            how = "each of them by another update"
            if len(changed) < len(change.ends):
                how = f"only {', '.join(changed)}"
            problems.append(
                f"{ends} are one tensor, but the adapter changes {how}; export_merged() writes "
                "them as two"
            )
    if problems:
        raise not_mergeable(name, problems)
    tensors = [
        tensor
        for change in changes
        for tensor in (
            own_tensors(change.holder.module) if change.weight is None else [change.weight]
        )
    ]
    problems = [
        f"{place} is the same weight, and the base of that model would change; "
        "detach() that model, or use export_merged() on this one"
        for place in places_in_other_models(session, tensors)
    ]
    if problems:
        raise not_mergeable(name, problems)


def _write_merged(
    session: Session, name: str, kept: Kept, changes: Sequence[Change]
) -> MergeReport:
    """Write W + ΔW into every weight. If one fails, all are restored."""
    originals: list[Original] = []
    weights: list[MergedWeight] = []

    def keep(item: Original) -> None:
        originals.append(item)
        rollback.add(item.restore)

    before, rollback = session.base, Rollback()
    rollback.add(partial(setattr, session, "base", before))
    session.base = before._replace(broken=_INTERRUPTED)  # noted before it becomes true
    try:
        for change in changes:
            holder, weight = change.holder, change.weight
            if weight is None:
                keep(Original.of_format(holder, change.parameter))
                error = _requantize_merged(change)
            else:
                keep(Original.of(holder, weight))
                error = add_to(weight, weight, change.delta, str(holder))
            weights.append(MergedWeight(str(holder), originals[-1].nbytes, error))
        written = tuple(item.with_checksum() for item in originals)
        report = MergeReport(name, tuple(weights), sum(item.nbytes for item in written))
        session.base = BaseState(Merged(report, written, kept), before.broken)
    except BaseException:
        rollback.run()
        raise
    return report


@torch.no_grad()
def _requantize_merged(change: Change) -> float:
    """Store W + ΔW in the weight's format. Returns the lost part of ΔW, as `MergedWeight.error`."""
    module, parameter = change.holder.module, change.parameter
    try:
        before = dequantize(module, parameter).float()
        swap = change.delta.site.eligible.transposed and parameter is None
        update = change.delta.update(0, change.delta.shape[0], before.mT if swap else before)
        if swap:
            update = update.mT
        if update.shape != before.shape:
            raise ConfigError(
                f"it is dequantised to {tuple(before.shape)}, but ΔW has {change.delta.shape}"
            )
        merged = before + update
        requantize(module, merged, parameter)
        after = dequantize(module, parameter).float()
    except ConfigError as error:
        raise MatchError(f"{change.holder}: {error}; nothing is merged") from error
    update_norm = float(torch.linalg.vector_norm(update))
    return float(torch.linalg.vector_norm(after - merged)) / update_norm if update_norm else 0.0
