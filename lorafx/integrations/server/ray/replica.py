"""One engine in a process of its own, with the adapters that requests have brought to it: they are
loaded when they are asked for, and unloaded when Ray has dropped them and no request needs them.

What the engine counts is exported by Ray with the names of deployment and replica.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import metrics

from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import BatchError, LorafxError, UnknownAdapterError
from lorafx.generation.continuous.failures import StepHealth
from lorafx.integrations.server.errors import error_response
from lorafx.integrations.server.metrics import counts
from lorafx.integrations.server.run import opened
from lorafx.integrations.server.settings import Settings
from lorafx.runtime.statistics import Statistics


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


class Counts:
    """The counts of one replica; made in its process. `stats` is `CompiledModel.stats`."""

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._stats, self._health = stats, health
        self._metrics: dict[str, metrics.Counter | metrics.Gauge] = {}
        #: What Ray knows.
        self._exported: dict[tuple[str, tuple[str, ...]], int] = {}

    def export(self) -> None:
        """Add to Ray's counters what has been counted since, and set how large the tiers are."""
        for count in counts(self._stats(), self._health):
            if count.name not in self._metrics:
                kind: Any = metrics.Gauge if count.size else metrics.Counter
                self._metrics[count.name] = kind(count.name, count.text, tuple(count.labels))
            metric, tags = self._metrics[count.name], dict(count.labels)
            if isinstance(metric, metrics.Gauge):
                metric.set(count.value, tags)
                continue
            key = count.name, tuple(tags.values())
            more = count.value - self._exported.get(key, 0)
            if more:
                metric.inc(more, tags)
                self._exported[key] = count.value


class Replica:
    """Ray's deployment of the engine, with `held` adapters in host memory; raises as `opened`."""

    def __init__(self, settings: Settings, held: int) -> None:
        self._stack = ExitStack()
        self._server = self._stack.enter_context(opened(settings, lazily=True))
        self._counts = Counts(self._server.compiled.stats, self._server.engine.health)
        self._held = adapters = HeldAdapters(self._server.compiled, settings.folder_of)

        async def load(adapter: str) -> object:
            return await adapters.load(adapter)

        # Ray tells its routers what this holds, and drops what was not asked for longest.
        self._hold = serve.multiplexed(max_num_models_per_replica=held)(load)

    def __del__(self) -> None:
        """Stop the engine. Ray calls it when the answers under way have been given."""
        self._stack.close()

    def check_health(self) -> None:
        """Raise BatchError where the engine takes no requests, or its last steps have all failed;
        Ray then replaces the replica. Ray asks regularly, so counts are exported here too."""
        self._counts.export()
        engine = self._server.engine
        reason = engine.unhealthy()
        if reason is not None:
            error = engine.background_thread_status.fatal_error or engine.health.last
            raise BatchError(
                f"the engine of this replica does not serve. {reason} {error or ''}".rstrip()
            ) from error

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict]]:
        """The ASGI messages of an answer, those that are ready at a time. The request's adapter is
        Ray's multiplexed model ID."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.put_nowait(dict(message))

        # A task of its own: a client that goes away is told to the application, which then cancels
        # its request with the engine.
        answering = asyncio.create_task(self._run(scope, receive, send))
        answering.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while True:
                ready = [await messages.get()]
                while not messages.empty():
                    ready.append(messages.get_nowait())
                if found := [message for message in ready if message is not None]:
                    yield found
                if ready[-1] is None:
                    break
            await answering
        finally:
            gone.set()

    async def _run(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        adapter = serve.get_multiplexed_model_id()
        if not adapter:
            await self._server.app(scope, receive, send)
            return
        with self._held.using(adapter):
            try:
                await self._hold(adapter)
            except LorafxError as error:
                await error_response(error)(scope, receive, send)
                return
            await self._server.app(scope, receive, send)
