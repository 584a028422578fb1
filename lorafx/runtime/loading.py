"""Loading and unloading of adapters while sessions serve: in one model, or by parts in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from lorafx.adapter_store.names import members
from lorafx.adapter_store.saved import AdapterSource, Origin, origin_of
from lorafx.adapter_store.stored import Adapter
from lorafx.errors import CheckpointError, ConfigError, ReplacedModuleError
from lorafx.interrupts import undisturbed
from lorafx.placements import agreed
from lorafx.runtime.running import refuse_transformed
from lorafx.runtime.session import Session, read_for
from lorafx.torch_internals.versions import entrance

#: The name of an adapter that is loaded without one, as in PEFT.
_DEFAULT_NAME = "default"


def name_to_load(session: Session, name: str | None, adapter_name: str | None) -> str:
    """The name under which to load an adapter; `adapter_name` is PEFT's keyword for it. Raises
    ConfigError if both are given and differ, or if neither is and a "default" is loaded already."""
    if name is not None and adapter_name is not None and name != adapter_name:
        raise ConfigError(f"name={name!r} and adapter_name={adapter_name!r} differ; give one")
    chosen = adapter_name if name is None else name
    if chosen is None and _DEFAULT_NAME in session.store:
        raise ConfigError(
            f"an adapter named {_DEFAULT_NAME!r} is loaded already, which this one would replace; "
            "give a name: load_adapter(source, name)"
        )
    return _DEFAULT_NAME if chosen is None else chosen


def load_adapter(session: Session, source: Any, name: str, strict: bool | None = None) -> None:
    """Read an adapter and keep it in host memory; it replaces one of the same name. Calls go on
    while the files are read. `strict` is as in `Options`; None stands for the value there.

    Raises:
        CheckpointError, UnsupportedAdapterError, CapacityError: it cannot be loaded.
        ConfigError: the adapter of this name is merged.
        ReplacedModuleError: a module that it changes was replaced or removed.
        BatchError: the call that is running on this thread serves the adapter of this name.
    """
    if source is None:  # which would mean "no part of the adapter" to `load_parts`
        source = AdapterSource(cast(Any, source))
    with entrance():
        load_parts([(session, source)], name, strict)


def load_parts(parts: Sequence[tuple[Session, Any]], name: str, strict: bool | None = None) -> None:
    """As `load_adapter`, for an adapter of several models: each loads the part that is paired with
    it, or, for None, unloads the adapter. If one part cannot be loaded, nothing changes."""
    refuse_transformed()
    read_parts = [
        None
        if source is None
        else (
            origin_of(source),
            agreed(session.program.model, partial(_read, session, source, name, strict)),
        )
        for session, source in parts
    ]

    sessions = [session for session, _ in parts]
    _keep([(session, name, part) for session, part in zip(sessions, read_parts, strict=True)])


def load_read(session: Session, adapters: Mapping[str, Adapter | None]) -> None:
    """Load these adapters, by name, which were read for the session, and unload those that are
    None. If one cannot be loaded, nothing changes. Raises as `load_adapter`."""
    refuse_transformed()
    parts = adapters.items()
    _keep([(session, name, None if part is None else (None, part)) for name, part in parts])


def _keep(parts: Sequence[tuple[Session, str, tuple[Origin | None, Adapter] | None]]) -> None:
    def keep() -> None:
        steps = [
            prepared_unload(session, name) if part is None else _prepared_load(session, name, *part)
            for session, name, part in parts
            if part is not None or name in session.store.names
        ]
        undisturbed(lambda: [step() for step in steps])

    _run_locked([*dict.fromkeys(session for session, _, _ in parts)], keep)


def in_lock_order(sessions: Iterable[Session]) -> list[Session]:
    """The sessions in the order in which several of their locks must be taken."""
    return sorted(sessions, key=lambda session: session.locks.number)


def _run_locked(sessions: Sequence[Session], action: Callable[[], None]) -> None:
    """Run `action` with the locks of all these sessions. An ExitStack would leave a lock taken
    after an interrupt."""
    for session in reversed(in_lock_order(sessions)):
        action = partial(_with_lock_of, session, action)
    action()


def _with_lock_of(session: Session, action: Callable[[], None]) -> None:
    with session.lock:
        session.locks.streams.follow(session.accelerators)
        action()


def unload_parts(sessions: Sequence[Session], name: str) -> None:
    """Unload the adapter of this name from those models that have it. Raises ConfigError if it is
    merged, and BatchError if the running call of this thread serves it, before anything changes."""
    load_parts([(session, None) for session in sessions], name)


def _read(session: Session, source: Any, name: str, strict: bool | None) -> Adapter:
    program = session.program
    with session.lock:
        _refuse_in_use(session, name)
        program.look_at_modules()
    try:
        strict = program.options.strict if strict is None else strict
        return read_for(program, source, name, strict=strict)
    except CheckpointError as error:  # the reason may be a missing module
        try:
            program.refuse_missing()
        except ReplacedModuleError as reason:
            raise reason from error
        raise


def _refuse_in_use(session: Session, name: str) -> None:
    session.refuse_merged(name, "is replaced")
    session.refuse_served(name, "replace")


def _prepared_load(
    session: Session, name: str, origin: Origin | None, adapter: Adapter
) -> Callable[[], None]:
    """A function that stores the adapter. What may have changed since it was read is checked."""
    program, merged = session.program, session.base.merged
    _refuse_in_use(session, name)
    program.look_at_modules()
    made = any(changed.structure is None for changed in adapter.changed.values())
    if (adapter.extras["dora"] or made) and merged is not None:
        what = "is a DoRA adapter, whose norms come from"
        what = "has weights that are made of" if made else what
        raise ConfigError(
            f"{name!r} {what} the base's own weights, but {merged.name!r} is merged into them; "
            "call unmerge() before loading it"
        )
    if adapter.replaces_biases and merged is not None:
        raise ConfigError(
            f"{name!r} has biases in the place of the base's own, which it is compared with, but "
            f"{merged.name!r} is merged into the base; call unmerge() before loading it"
        )
    program.refuse_missing(
        [
            site.path
            for site in program.sites
            if any(site.part_path(part) in adapter.weights for part in range(len(site.parts)))
        ]
    )
    keep = session.store.prepare_load(adapter, origin)

    def load() -> None:
        keep()
        session.forget_served()

    return load


def prepared_unload(session: Session, name: str) -> Callable[[], None]:
    """A function that unloads an adapter, and raises UnknownAdapterError if it is not loaded.
    Raises ConfigError if it is merged, BatchError if the running call serves it. The lock is held.
    """
    session.refuse_merged(name, "is unloaded")
    session.refuse_served(name, "unload")

    def unload() -> None:
        session.store.unload(name)
        session.forget_served()
        if session.default is not None and name in members(session.default):
            session.choose(None)

    return unload
