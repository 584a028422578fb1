"""One engine in a process of its own. An adapter is loaded when it is first requested, and unloaded
when Ray has dropped it and no request uses it.

Ray exports the engine's metrics with the names of deployment and replica.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from ray import serve
from ray.serve import metrics

from lorafx.errors import BatchError, LorafxError, UnknownAdapterError
from lorafx.generation.continuous.failures import StepHealth
from lorafx.integrations.server.errors import error_response
from lorafx.integrations.server.metrics import Labels, families
from lorafx.integrations.server.run import opened
from lorafx.integrations.server.settings import ModelSettings
from lorafx.runtime.statistics import Statistics


class Counts:
    """The metrics of one replica, in its process. `stats` is `CompiledModel.stats`."""

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._stats, self._health, self._label = stats, health, Labels()
        self._metrics: dict[str, metrics.Counter | metrics.Gauge] = {}
        #: The values of counters that were exported last.
        self._exported: dict[tuple[str, tuple[str, ...]], float] = {}

    def export(self) -> None:
        """Add to Ray's counters what was counted since the last export, and set its gauges."""
        for family in families(self._stats(), self._health, self._label):
            for sample in family.samples:
                if family.name not in self._metrics:
                    kind: Any = metrics.Gauge if family.type == "gauge" else metrics.Counter
                    tags = tuple(sample.labels)
                    self._metrics[family.name] = kind(family.name, family.documentation, tags)
                metric = self._metrics[family.name]
                if isinstance(metric, metrics.Gauge):
                    metric.set(sample.value, sample.labels)
                    continue
                key = family.name, tuple(sample.labels.values())
                increase = sample.value - self._exported.get(key, 0)
                if increase:
                    metric.inc(increase, sample.labels)
                    self._exported[key] = sample.value


class HeldAdapter:
    """An adapter that Ray keeps. Ray calls `__del__` when it drops the adapter, Python again."""

    def __init__(self, drop: Callable[[], None]) -> None:
        self._drop: Callable[[], None] | None = drop

    def __del__(self) -> None:
        drop, self._drop = self._drop, None
        if drop is not None:
            drop()


class Replica:
    """Ray's deployment of the engine. It keeps the last `held` adapters that were requested. Raises
    what `opened` raises."""

    def __init__(self, settings: ModelSettings, held: int) -> None:
        self._settings = settings
        self._stack = ExitStack()
        self._server = self._stack.enter_context(opened(settings, lazily=True))
        self._counts = Counts(self._server.compiled.stats, self._server.engine.health)

        self._changing = asyncio.Lock()
        self._users: Counter[str] = Counter()  # requests under way
        self._dropped: set[str] = set()

        async def load(adapter: str) -> HeldAdapter:
            await self._load(adapter)
            return HeldAdapter(partial(self._dropped.add, adapter))

        # Ray tells its routers which adapters this function has loaded.
        self._load_for_ray = serve.multiplexed(max_num_models_per_replica=held)(load)

    async def _load(self, adapter: str) -> None:
        """Load an adapter unless it is loaded. Raises what `CompiledModel.load_adapter` raises, and
        UnknownAdapterError if it has no folder."""
        async with self._changing:
            self._dropped.discard(adapter)
            if adapter in self._server.compiled.adapters:
                return
            folder = self._settings.folder_of(adapter)
            if folder is None:
                raise UnknownAdapterError(f"there is no adapter {adapter!r}")
            await asyncio.to_thread(self._server.compiled.load_adapter, folder, adapter)

    async def _unload_dropped(self) -> None:
        async with self._changing:
            for adapter in [name for name in self._dropped if not self._users[name]]:
                self._dropped.discard(adapter)
                await asyncio.to_thread(self._server.compiled.unload_adapter, adapter)

    def __del__(self) -> None:
        """Stop the engine. Ray calls this when the running requests have been answered."""
        self._stack.close()

    def check_health(self) -> None:
        """Raise BatchError if the engine takes no requests, or its last steps have all failed; Ray
        then replaces the replica. Ray calls this regularly, so it exports the metrics, too."""
        self._counts.export()
        engine = self._server.engine
        reason = engine.unhealthy()
        if reason is not None:
            error = engine.background_thread_status.fatal_error or engine.health.last
            raise BatchError(
                f"the engine of this replica does not serve. {reason} {error or ''}".rstrip()
            ) from error

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict]]:
        """The ASGI messages of an answer, in lists of those that are ready. The request's adapter
        is Ray's multiplexed model ID."""
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

        # The application runs in another task. When the client disconnects, it receives
        # `http.disconnect` and cancels the engine's request.
        answering = asyncio.create_task(self._run(scope, receive, send))
        answering.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while True:
                ready = [await messages.get()]
                while not messages.empty():
                    ready.append(messages.get_nowait())
                if present := [message for message in ready if message is not None]:
                    yield present
                if ready[-1] is None:
                    break
            await answering
        finally:
            gone.set()

    async def _run(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        adapter = serve.get_multiplexed_model_id()
        self._users[adapter] += 1
        try:
            try:
                if adapter:
                    await self._load_for_ray(adapter)
                await self._unload_dropped()
            except LorafxError as error:
                await error_response(error)(scope, receive, send)
                return
            await self._server.app(scope, receive, send)
        finally:
            self._users[adapter] -= 1
