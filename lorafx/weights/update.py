"""load_weights: new base weights for a model that is serving.

    source ─▶ plan ─▶ writes (lorafx.weights) ─▶ what follows: copies of weights, norms of DoRA

Numbers are written in place, so packed buffers, tied weights and captured graphs see them. A source
that can be read twice is checked before the first write. For any other (a generator) the old
weights are kept, and put back where something is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lorafx.errors import ConfigError
from lorafx.interrupts import Rollback
from lorafx.model.packing import check_packed
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import refresh_elsewhere
from lorafx.weights.copies import Copies
from lorafx.weights.loader import Loading, Undo, UndoLog
from lorafx.weights.merge import unmerged
from lorafx.weights.resolve import Resolver
from lorafx.weights.sources import Weights, WeightSource, source_of

_BROKEN = (
    "an update of the base weights was interrupted during its writes, and they are partly "
    "old and partly new; call load_weights again with all weights"
)


@dataclass(frozen=True)
class WeightUpdate:
    """What an update did, by name.

    Attributes:
        loaded: parameters and buffers of the model that got numbers; for tied ones all names.
        missing: parameters that got none or only some, and tensors that lack for a joint place.
        ignored: tensors that the model has no place for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]


def update_weights(
    session: Session, weights: Weights, *, strict: bool = True, undo: Undo = "memory"
) -> WeightUpdate:
    if undo not in ("memory", "disk"):
        raise ConfigError(f'undo is "memory" or "disk", got {undo!r}')
    source = source_of(weights)
    session.refuse_running("load_weights()")
    update = partial(_update, session, source, strict=strict, undo=undo)
    report = unmerged(session, lambda: session.update(update))
    refresh_elsewhere(session)
    return report


def _update(session: Session, source: WeightSource, *, strict: bool, undo: Undo) -> WeightUpdate:
    program = session.program
    program.look_at_modules()
    program.refuse_missing()
    check_packed(program.packed)
    resolver = Resolver(program.graph, program.model, program.config.packed_modules)
    copies = Copies(program)
    loading = Loading(resolver, source, strict=strict, derived=copies)
    loading.check()
    plan = loading.plan
    if source.repeatable and not (loading.fallible or copies.fallible(plan.filled())):
        _write(session, loading, copies, None)
    else:
        with UndoLog.kept(undo) as undo_log:
            _write(session, loading, copies, undo_log)
    return WeightUpdate(
        tuple(target.name for target in plan.filled()), tuple(plan.missing), tuple(plan.ignored)
    )


def _write(session: Session, loading: Loading, copies: Copies, undo_log: UndoLog | None) -> None:
    """Write all of it, and what follows; the undo log, if any, puts it back after an error."""
    before, rollback = session.base, Rollback()
    if undo_log is not None:
        rollback.add(partial(setattr, session, "base", before))
        rollback.add(session.store.refresh_magnitudes)
        rollback.add(undo_log.restore)
    session.base = before._replace(broken=_BROKEN)  # said before it is so
    try:
        loading.write(undo_log)
        copies.refresh(loading.plan.filled(), undo_log)
        session.store.refresh_magnitudes()
        broken = before.broken if loading.plan.missing else ""
        session.base = before._replace(broken=broken)
    except BaseException:
        if undo_log is None:
            # Copies stay those of the weights, so that the next update finds them.
            copies.recompute(loading.plan.filled())
        rollback.run()
        raise
