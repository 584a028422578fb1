"""The adapters that a replica has in host memory: loaded when they are asked for, unloaded when
Ray has dropped them and no request needs them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafx.errors import UnknownAdapterError
from lorafx.serving.compiled import CompiledModel


class HeldAdapter:
    """An adapter as Ray keeps it. `drop` has it unloaded, unless it has been loaded again; it is
    called on any thread, any number of times."""

    def __init__(self, drop: Callable[[], None]) -> None:
        self.drop = drop

    def __del__(self) -> None:
        """Ray calls this of what it drops, and Python does once more."""
        self.drop()


class HeldAdapters:
    """The adapters of one replica. All methods run on its event loop. `folder_of` gives None for a
    name that there is not."""

    def __init__(self, compiled: CompiledModel, folder_of: Callable[[str], Path | None]) -> None:
        self._compiled = compiled
        self._folder_of = folder_of
        self._users: Counter[str] = Counter()
        #: What Ray keeps, as the number of the `HeldAdapter` that it has.
        self._kept: dict[str, int] = {}
        self._numbers = 0
        self._changing = asyncio.Lock()
        self._unloading: set[asyncio.Task[None]] = set()

    async def load(self, name: str) -> HeldAdapter:
        """Have an adapter loaded until Ray drops what is returned. Raises as
        `CompiledModel.load_adapter`, and UnknownAdapterError where it has no folder."""
        loading = asyncio.create_task(self._load(name))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            # The thread that reads goes on, and nobody keeps what it reads.
            loading.add_done_callback(lambda task: task.exception() or task.result().drop())
            raise

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Around a request that needs an adapter: once loaded, it stays."""
        self._users[name] += 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self._unload_soon(name)

    async def _load(self, name: str) -> HeldAdapter:
        async with self._changing:
            if name not in self._compiled.adapters:
                folder = self._folder_of(name)
                if folder is None:
                    raise UnknownAdapterError(f"there is no adapter {name!r}")
                await asyncio.to_thread(self._compiled.load_adapter, folder, name)
            self._numbers += 1
            number = self._kept[name] = self._numbers
        loop = asyncio.get_running_loop()

        def drop() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._drop, name, number)

        return HeldAdapter(drop)

    def _drop(self, name: str, number: int) -> None:
        if self._kept.get(name) == number:  # else it has been loaded again
            del self._kept[name]
            self._unload_soon(name)

    def _unload_soon(self, name: str) -> None:
        if self._needed(name):
            return
        task = asyncio.get_running_loop().create_task(self._unload(name))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload(self, name: str) -> None:
        async with self._changing:
            if not self._needed(name) and name in self._compiled.adapters:
                await asyncio.to_thread(self._compiled.unload_adapter, name)

    def _needed(self, name: str) -> bool:
        return name in self._kept or name in self._users
