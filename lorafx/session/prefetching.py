"""Adapters that are brought nearer before a call asks for them: into host memory, into slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorafx.adapter_store.stored import Hold
from lorafx.errors import LorafxError
from lorafx.session.running import refuse_transformed
from lorafx.session.session import Session


def prefetch(session: Session, names: Sequence[str | None], *, slots: bool) -> None:
    """Have these adapters in host memory, or in `slots`.

    Raises:
        UnknownAdapterError: a name that is not loaded.
        CheckpointError: a file has changed since it was loaded, or cannot be read.
        ConfigError: a sum of adapters that can be part of none.
        CapacityError: into slots, and there are not as many.
    """
    refuse_transformed()
    store = session.store
    for name in names:
        if name is not None:
            store.check_known(name)
    host_copies = store.fetch(names)  # read before the lock is taken
    if not slots:
        return
    with session.lock:
        if not store.copy_streams.beside:
            session.locks.streams.follow(session.accelerators)
        store.fill(names, _read(session))
    del host_copies  # which had them stay in memory until here


def fill_ahead(session: Session, holds: Iterable[Hold]) -> None:
    """Begin to copy these adapters, in their order, into slots that the call before this one does
    not use, as many as find some. Nothing is done where steps would wait for it. The lock is held.
    """
    store = session.store
    if not store.copy_streams.beside:
        return
    held = frozenset(session.program.runtime.rows)
    for hold in holds:
        try:
            held = held.union(store.fill([store.held_name(hold)], held))
        except LorafxError:  # no slot is left, or the call that asks for it will say what is wrong
            return


def _read(session: Session) -> frozenset[int]:
    """The slots of forwards that are under way, and of graphs that may be replayed: those of the
    last call."""
    running = session.running
    if running.entries or session.store.copy_streams.captured:
        return running.held.union(session.program.runtime.rows)
    return running.held
