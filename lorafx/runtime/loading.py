"""Adapters that come and go while sessions serve: loaded into one model, or by parts into several,
unloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lorafx.adapter_store.names import members
from lorafx.adapter_store.saved import AdapterSource, Origin, origin_of
from lorafx.adapter_store.stored import Adapter
from lorafx.errors import CheckpointError, ConfigError, ReplacedModuleError
from lorafx.interrupts import undisturbed
from lorafx.runtime.running import refuse_transformed
from lorafx.runtime.session import Session, read_for
from lorafx.torch_internals.versions import entrance

#: The name of an adapter that is given without one, as in PEFT.
_UNNAMED = "default"


def asked_name(session: Session, name: str | None, adapter_name: str | None) -> str:
    """The name to load an adapter under; `adapter_name` is PEFT's keyword for it. Raises
    ConfigError where they differ, or neither is given and there is a "default" already."""
    if name is not None and adapter_name is not None and name != adapter_name:
        raise ConfigError(f"name={name!r} and adapter_name={adapter_name!r} differ; give one")
    given = adapter_name if name is None else name
    if given is None and _UNNAMED in session.store:
        raise ConfigError(
            f"an adapter named {_UNNAMED!r} is loaded already, which this one would replace; "
            "give a name: load_adapter(source, name)"
        )
    return _UNNAMED if given is None else given


def load_adapter(session: Session, source: Any, name: str, strict: bool | None = None) -> None:
    """Read an adapter and keep it in host memory, in place of one of the same name. Calls go on
    while the files are read. `strict` as in `Options`, whose value None stands for.

    Raises:
        CheckpointError, UnsupportedAdapterError, CapacityError: nothing has changed then.
        ConfigError: the adapter of this name is merged.
        ReplacedModuleError: a module that it is for was replaced or taken out.
        BatchError: the call that is running on this thread serves it.
    """
    # `load_parts` takes None for a session without a part of the adapter, which forgets it.
    given: Any = source
    with entrance():
        load_parts([(session, AdapterSource(given) if source is None else source)], name, strict)


def load_parts(parts: Sequence[tuple[Session, Any]], name: str, strict: bool | None = None) -> None:
    """As `load_adapter`, into several models: each has the part of the adapter that stands beside
    it, or none of this name where that is None. Where one part cannot be loaded, none is."""
    refuse_transformed()
    read = [
        None if source is None else (origin_of(source), _read(session, source, name, strict))
        for session, source in parts
    ]

    def keep() -> None:
        steps = [
            unloading(session, name) if part is None else _keeping(session, name, *part)
            for (session, _), part in zip(parts, read, strict=True)
            if part is not None or name in session.store.names
        ]
        undisturbed(lambda: [step() for step in steps])

    _locked([session for session, _ in parts], keep)


def in_turn(sessions: Iterable[Session]) -> list[Session]:
    """In the order in which their locks are taken where several are."""
    return sorted(sessions, key=lambda session: session.locks.number)


def _locked(sessions: Sequence[Session], action: Callable[[], None]) -> None:
    """Run `action` while no other thread calls any of these. An interrupt inside of an ExitStack
    would leave a lock taken."""
    for session in reversed(in_turn(sessions)):
        action = partial(_holding, session, action)
    action()


def _holding(session: Session, action: Callable[[], None]) -> None:
    with session.lock:
        session.locks.streams.follow(session.accelerators)
        action()


def unload_parts(sessions: Sequence[Session], name: str) -> None:
    """Forget the adapter of this name in all of these models that have it. Raises ConfigError where
    it is merged, BatchError where the running call of this thread serves it, before any change."""
    load_parts([(session, None) for session in sessions], name)


def _read(session: Session, source: Any, name: str, strict: bool | None) -> Adapter:
    program = session.program
    with session.lock:
        _refuse(session, name)
        program.look_at_modules()
    try:
        strict = program.options.strict if strict is None else strict
        return read_for(program, source, name, strict=strict)
    except CheckpointError as error:  # of which a module that is missing may be the reason
        try:
            program.refuse_missing()
        except ReplacedModuleError as reason:
            raise reason from error
        raise


def _refuse(session: Session, name: str) -> None:
    session.refuse_merged(name, "is replaced")
    session.refuse_served(name, "replace")


def _keeping(
    session: Session, name: str, origin: Origin | None, adapter: Adapter
) -> Callable[[], None]:
    """What keeps the adapter. What was true when the files were read is looked at again."""
    program, merged = session.program, session.base.merged
    _refuse(session, name)
    program.look_at_modules()
    if adapter.extras["dora"] and merged is not None:
        raise ConfigError(
            f"{name!r} is a DoRA adapter, whose norms come from the base's own weights, "
            f"but {merged.name!r} is merged into them; call unmerge() before loading it"
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


def unloading(session: Session, name: str) -> Callable[[], None]:
    """What forgets an adapter, and raises UnknownAdapterError where it is not loaded. Raises
    ConfigError where it is merged, BatchError where the running call serves it. The lock is held.
    """
    session.refuse_merged(name, "is unloaded")
    session.refuse_served(name, "unload")

    def unload() -> None:
        session.store.unload(name)
        session.forget_served()
        if session.default is not None and name in members(session.default):
            session.choose(None)

    return unload
