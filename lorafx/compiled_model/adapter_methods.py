"""Methods of a compiled model for its adapters: loading, pinning, the default, what is loaded.

PEFT's and transformers' names for them are served too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never

from lorafx.adapter_store.names import BASE, AdapterName, members, one_name
from lorafx.adapter_store.saved import Source
from lorafx.adapter_store.store import AdapterInfo, info
from lorafx.compiled_model.names import refuse_arguments
from lorafx.errors import BatchError, ConfigError
from lorafx.interrupts import undisturbed
from lorafx.runtime.loading import asked_name, load_adapter, prefetch, unloading
from lorafx.runtime.running import refuse_transformed

if TYPE_CHECKING:
    from lorafx.runtime.session import Session


class ActiveAdapters(tuple[str, ...]):
    """Names of adapters. PEFT reads `active_adapters`, transformers calls it; both get them."""

    def __call__(self) -> ActiveAdapters:
        return self


class AdapterMethods:
    """The part of `CompiledModel` that is about adapters."""

    _session: Session
    #: What the default was before each block of `disable_adapter` that is open; under the lock.
    _disabling: list[list[str | None]]

    def set_adapter(self, name: AdapterName | Sequence[str]) -> None:
        """Set the adapter of calls that name none; None is the base model, a mapping a sum as in
        `forward`, a list the sum of these adapters, as in PEFT.

        Raises:
            UnknownAdapterError: it is not loaded.
            ConfigError: another one is merged; or as `forward` for a sum.
            CapacityError: as `forward` for a sum.
            BatchError: called from the source that `load_weights` reads, or inside a call.
        """
        self._session.refuse_running("set_adapter()")
        if isinstance(name, (list, tuple)):
            name = dict.fromkeys(name, 1.0)
        name = one_name(name, "the default")
        name = None if name == BASE else name
        with self._session.lock:  # an update takes a merge out and puts it back
            if name is not None:
                self._session.store[name]
            merged = self._session.base.merged
            if merged is not None and merged.name != name:
                raise ConfigError(
                    f"{merged.name!r} is merged and serves the calls that name no adapter; "
                    f"call unmerge() before set_adapter({name!r})"
                )
            self._session.choose(name)

    def load_adapter(
        self,
        source: Source,
        name: str | None = None,
        *,
        adapter_name: str | None = None,
        strict: bool | None = None,
        **elsewhere: Never,
    ) -> None:
        """Read an adapter and keep it in host memory; a batch that names it gives it a slot.

        An adapter of the same name is replaced. Calls go on while the files are read; requests of
        a continuous batch that have been added keep the version that they were added with.

        Args:
            source: a folder, a file, a name on the Hugging Face hub, the bytes of a file, tensors
                by name, or an `AdapterSource`, which also says what the files do not: a
                configuration, the dialect, modules that moved (docs/adapters.md).
            name: what calls name it by, which `adapter_name`, PEFT's keyword, says too. Without
                either it is "default", as in PEFT, which replaces no adapter. It does not become
                the default of `set_adapter`.
            strict: whether the file must have factors for every selected module that the adapter's
                own configuration targets. Otherwise such a module keeps W, with one warning. None
                means `Options.strict`.
            **elsewhere: what PEFT and transformers take (`is_trainable`, ...): refused with the way
                out, unless it is False or None.

        Raises:
            CheckpointError, UnsupportedAdapterError, CapacityError: nothing has changed then.
            ConfigError: no name, where one is needed; the adapter of this name is merged, or any
                adapter is merged and this one is DoRA, whose norms come from the base's weights.
            BatchError: the call that is running on this thread serves the adapter of this name.
        """
        refuse_arguments("load_adapter", (), elsewhere)
        named = asked_name(self._session, name, adapter_name)
        load_adapter(self._session, source, named, strict)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its slot. If it was the default, or part of a sum that was,
        the base model becomes the default.

        Raises:
            UnknownAdapterError: it is not loaded.
            ConfigError: it is merged.
            BatchError: the call that is running on this thread serves it.
        """
        session = self._session
        with session.lock:
            session.locks.streams.follow(session.accelerators)
            undisturbed(unloading(session, name))

    def pin_adapter(self, name: str) -> None:
        """Bring an adapter into a slot now and keep it there.

        Raises:
            UnknownAdapterError: it is not loaded.
            CapacityError: every slot is pinned.
            BatchError: called inside a forward on this thread, for an adapter without a slot.
        """
        refuse_transformed()
        session = self._session
        with session.lock:  # a slot that it takes may be one that a running call reads
            if session.running.entries and name not in session.store.resident:
                raise BatchError(
                    f"a forward is running on this thread; pin {name!r} when it has returned"
                )
            session.locks.streams.follow(session.accelerators)
            session.store.pin(name)

    def unpin_adapter(self, name: str) -> None:
        """Let a pinned adapter be evicted again.

        Raises:
            UnknownAdapterError: it is not loaded.
        """
        self._session.store.unpin(name)

    def prefetch_adapters(self, names: Iterable[AdapterName]) -> None:
        """Give adapters slots before a call asks for them, in the place of those that were used
        least recently; calls of other threads go on.

        On CUDA their factors are copied on a stream of their own, beside the calls that are running
        there; a call that uses one of them waits for its copy. This returns when the copies have
        been launched. On a CPU it returns when they are done.

        Args:
            names: of adapters, or sums, as in `forward`; None is the base model, which is there.

        Raises:
            UnknownAdapterError: a name that is not loaded.
            ConfigError: as `forward` for a sum.
            CapacityError: more adapters than there are slots, or than those leave free that are
                pinned, or used by a call around this one.
        """
        prefetch(self._session, [one_name(name, "prefetch_adapters()") for name in names])

    @property
    def adapter_versions(self) -> dict[str, int]:
        """The loaded adapters, and the version of each: a number that no other adapter that was
        loaded in this process has, and that grows when one is replaced. A call serves one version
        of each, in all layers."""
        return self._session.store.versions

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in order of loading."""
        return self._session.store.names

    @property
    def active_adapter(self) -> str | None:
        """The default of `set_adapter`: the adapter of calls that name none; None is the base. A
        sum reads "0.7·sql + 0.3·style"."""
        return self._session.default

    @property
    def active_adapters(self) -> ActiveAdapters:
        """The adapters of `active_adapter`: none, one, or those of a sum. It may be called too."""
        default = self._session.default
        return ActiveAdapters(() if default is None else members(default))

    def list_adapters(self) -> list[str]:
        """Names of the loaded adapters, in order of loading."""
        return list(self._session.store.names)

    def get_adapter(self, name: str) -> AdapterInfo:
        """What is known of a loaded adapter: source, rank, sites, version, slot, memory.

        Raises:
            UnknownAdapterError: it is not loaded.
        """
        return info(self._session.store, name)

    def delete_adapter(self, name: str) -> None:
        """As `unload_adapter`, under PEFT's name."""
        self.unload_adapter(name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, calls that name no adapter are the base's; then the default is put back.

        It is `set_adapter(None)` for the length of a block, in all threads. Calls that name
        adapters get them. Where blocks of several threads overlap, the last one that ends puts the
        default back. A default that was unloaded inside is not put back.

        Raises:
            ConfigError: an adapter is merged.
            BatchError: as `set_adapter`.
        """
        session, blocks = self._session, self._disabling
        with session.lock:
            block = [session.default]
            self.set_adapter(None)
            blocks.append(block)
        try:
            yield
        finally:
            with session.lock:
                at = next(place for place, other in enumerate(blocks) if other is block)
                del blocks[at]
                if at < len(blocks):  # another thread's, or task's, which began in this one
                    blocks[at][0] = blocks[at][0] or block[0]
                elif block[0] is not None and block[0] in session.store:
                    self.set_adapter(block[0])
