"""One engine in a process of its own, with the adapters that requests have brought to it.

What the engine counts is exported by Ray with the names of deployment and replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

from ray import serve
from ray.serve.metrics import Counter, Gauge

from lorafx.errors import BatchError, LorafxError
from lorafx.server.errors import error_response
from lorafx.server.metrics import COUNTED, COUNTED_OF_TIERS, FAILED_STEPS, TIER_BYTES, TOKENS
from lorafx.server.ray.held_adapters import HeldAdapters
from lorafx.server.run import opened
from lorafx.server.settings import Settings
from lorafx.serving.continuous.health import StepHealth
from lorafx.session.statistics import Statistics


class Counts:
    """The counts of one replica; made in its process.

    Args:
        stats: gives the model's own counts, `CompiledModel.stats`.
        health: of the engine.
    """

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._stats = stats
        self._health = health
        self._adapters = {
            name: Counter(f"lorafx_adapter_{name}", text) for name, text in COUNTED.items()
        }
        self._tiers = {
            name: Counter(f"lorafx_tier_{name}", text, tag_keys=("tier",))
            for name, text in COUNTED_OF_TIERS.items()
        }
        self._nbytes = Gauge("lorafx_tier_bytes", TIER_BYTES, tag_keys=("tier",))
        self._tokens = Counter("lorafx_tokens", TOKENS, tag_keys=("adapter",))
        self._failed = Counter("lorafx_failed_steps", FAILED_STEPS)
        #: (counter, what it is of) -> what Ray has been told
        self._told: dict[tuple[Counter, str], int] = {}

    def export(self) -> None:
        """Tell Ray what has been counted since it was told last, and how large the tiers are."""
        stats = self._stats()
        for name, counter in self._adapters.items():
            self._tell(counter, getattr(stats, name))
        for tier, of_tier in stats.tiers.items():
            self._nbytes.set(of_tier.nbytes, {"tier": tier})
            for name, counter in self._tiers.items():
                self._tell(counter, getattr(of_tier, name), "tier", tier)
        for adapter, tokens in stats.tokens.items():
            self._tell(self._tokens, tokens, "adapter", adapter)
        self._tell(self._failed, self._health.failed)

    def _tell(self, counter: Counter, count: int, tag: str = "", value: str = "") -> None:
        """Have `counter` be `count`, of what `tag` says."""
        more = count - self._told.get((counter, value), 0)
        if more:
            counter.inc(more, {tag: value} if tag else {})
            self._told[counter, value] = count


class Replica:
    """Ray's deployment of the engine.

    Args:
        settings: of the model.
        held: how many adapters are held in host memory.

    Raises:
        Whatever `opened` raises.
    """

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
        Ray then replaces the replica.

        Ray asks regularly, so counts are exported here too.
        """
        self._counts.export()
        engine = self._server.engine
        reason = engine.unhealthy()
        if reason is not None:
            error = engine.background_thread_status.fatal_error or engine.health.last
            raise BatchError(
                f"the engine of this replica does not serve. {reason} {error or ''}".rstrip()
            ) from error

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict]]:
        """The ASGI messages of an answer, those that are ready at a time.

        Args:
            scope: the ASGI scope of an HTTP request; its adapter is Ray's multiplexed model ID.
            body: of the request.
        """
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
