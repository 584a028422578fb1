"""What a trainer elsewhere controls: whether the engine generates, what is kept of prompts, and the
base weights.

    /pause ─▶ no request begins ─▶ what runs is aborted, ends, or stands still ─▶ /resume
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import LorafxError, some
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.integrations.server.admission import pieces_of
from lorafx.integrations.server.errors import RequestError, message_of
from lorafx.integrations.server.settings import ModelSettings, Settings

T = TypeVar("T")
#: What becomes of the sequences under way when the engine is paused, as in vLLM.
PauseMode = Literal["abort", "wait", "keep"]


class Control:
    """Does one thing after another, each to its end, also if its client goes away.

    Attributes:
        paused: whether requests wait for `resume`.
    """

    def __init__(
        self, compiled: CompiledModel, engine: AdapterBatchingManager, settings: ModelSettings
    ) -> None:
        self._compiled, self._engine = compiled, engine
        self._most: int | None = None
        if isinstance(settings, Settings) and settings.allow_control:
            self._most = settings.max_upload_bytes
        self.paused = False
        #: What requests wait for that may not begin.
        self._closed: asyncio.Event | None = None
        self._kept = ExitStack()
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1)  # transformers counts the pauses of each thread

    def refuse_unless_allowed(self) -> None:
        """Raise RequestError, with status 403, if the settings do not allow control."""
        if self._most is None:
            text = "this server is not controlled by requests; `lorafx serve --allow-control` is"
            raise RequestError(text, status=403)

    async def admitted(self) -> None:
        """Wait until requests may begin. The caller begins before it awaits anything else."""
        while self._closed is not None:
            await self._closed.wait()

    async def pause(self, mode: PauseMode, *, reset: bool) -> None:
        """Let no request begin. Sequences under way end with what they have ("abort"), are waited
        for ("wait"), or stand still until `resume` ("keep"). Unless they do, pages of earlier
        prompts are forgotten with `reset`."""

        def settle() -> None:
            self._kept.close()
            if mode == "keep":
                self._kept.enter_context(self._engine.pause())
                return
            self._engine.drain(abort=mode == "abort")
            if reset:
                self._engine.reset_pages()

        await self._alone(settle, paused=True)

    async def resume(self) -> None:
        """Let requests begin, and those that stand still go on."""
        await self._alone(self._kept.close, paused=False)

    async def reset_pages(self) -> bool:
        """As the engine's."""
        return await self._alone(self._engine.reset_pages)

    async def update_weights(self, file: Path, *, strict: bool) -> dict[str, Any]:
        """Load a file of safetensors into the base weights when the sequences under way have ended;
        returns the names. Raises RequestError if the tensors do not fit, or sequences stand still;
        nothing has changed then."""

        def update() -> dict[str, Any]:
            if self.paused and self._engine.busy:
                text = "sequences stand still that began with the present weights; POST /pause"
                raise RequestError(f"{text} with the mode abort or wait first", status=409)
            self._engine.drain()
            try:
                names = vars(self._compiled.load_weights(file, strict=strict))
            except LorafxError as error:
                raise RequestError(message_of(error)) from error
            if not names["loaded"]:  # as it may be without `strict`
                ignored = some(names["ignored"]) or "there is none"
                raise RequestError(f"no tensor of the body has a place in the model: {ignored}")
            return names

        return await self._alone(update)

    def end(self) -> None:
        """Let the engine go on, so that it can be stopped."""
        self._thread.submit(self._kept.close).result()
        self._thread.shutdown()

    async def _alone(self, action: Callable[[], T], paused: bool | None = None) -> T:
        """Run an action while no request begins. Whether they do afterwards is `paused`, unless
        that is None or the action fails."""

        async def run() -> T:
            async with self._lock:
                self._closed = self._closed or asyncio.Event()
                try:
                    loop = asyncio.get_running_loop()
                    result = await loop.run_in_executor(self._thread, action)
                    self.paused = self.paused if paused is None else paused
                except RuntimeError as error:  # the engine has ended
                    raise RequestError(str(error), status=503) from error
                finally:
                    if not self.paused:
                        self._closed.set()
                        self._closed = None
                return result

        return await asyncio.shield(asyncio.ensure_future(run()))

    @asynccontextmanager
    async def upload(self, request: Request) -> AsyncIterator[Path]:
        """The body of a request as a file, while the block runs. Raises RequestError, with status
        413 as soon as the body is known to be too large, and 499 if its client goes away."""
        self.refuse_unless_allowed()
        with NamedTemporaryFile(suffix=".safetensors") as file:
            try:
                async for piece in pieces_of(request, self._most, "--max-upload-bytes"):
                    file.write(piece)
            except ClientDisconnect as error:
                text = "the client went away before the end of the body"
                raise RequestError(text, status=499) from error
            file.flush()
            yield Path(file.name)
