"""Adapters that come and go while requests are answered: those that clients load and unload, and
those that are found when a request first asks for them. All are in one folder, or in files there,
which a trainer may write over or remove as soon as it has its answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from lorafx.adapter_store.names import BASE
from lorafx.adapter_store.saved import AdapterSource, read_source
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import LorafxError, nearest
from lorafx.integrations.server.errors import RequestError, message_of
from lorafx.integrations.server.settings import (
    CONFIG,
    UNPRINTABLE,
    ModelSettings,
    Settings,
    adapter_folder,
)


class UnloadFields(BaseModel):
    """The fields of /v1/unload_lora_adapter."""

    model_config = ConfigDict(strict=True)

    lora_name: str = ""


class LoadFields(UnloadFields):
    """The fields of /v1/load_lora_adapter."""

    lora_path: str = ""
    load_inplace: bool | None = None


class AdapterLoading:
    """Loads and unloads adapters where clients ask for that, and loads those that have a folder
    when they are first asked for; each if the settings say so."""

    def __init__(self, compiled: CompiledModel, settings: ModelSettings) -> None:
        self._compiled, self._settings = compiled, settings
        #: The folders from which clients load, and in which adapters are found.
        self._loads: Path | None = None
        self._finds: Path | None = None
        self._controlled = isinstance(settings, Settings) and settings.allow_control
        if isinstance(settings, Settings):
            self._loads = settings.root() if settings.allow_runtime_loading else None
            self._finds = settings.root() if settings.resolve_adapters else None
            self._largest = settings.max_upload_bytes
            self._limit = asyncio.Semaphore(settings.max_adapter_reads)
        self._readings: dict[str, asyncio.Task[None]] = {}

    def load(self, body: dict[str, Any], content: bytes | None = None) -> Response:
        """Load the adapter at `lora_path`, or of this content, as `lora_name`; returns the
        answer, which has its version in a header. Raises RequestError if that is refused."""
        root = None if content is not None else self._folder_or_refuse()
        name, path = _text(body, "lora_name"), root and _text(body, "lora_path")
        if not name.isprintable():
            raise RequestError(f"`lora_name` {UNPRINTABLE}; got {name!r:.200}", "lora_name")
        if name in (BASE, *self._settings.names):  # requests for it would get the base's answer
            raise RequestError(f"{name!r} is the base model", "lora_name")
        if name in self._compiled.adapters and body.get("load_inplace") is not True:
            raise RequestError(
                f"an adapter {name!r:.200} is loaded; unload it first, or send "
                '"load_inplace": true to replace it',
                "lora_name",
            )
        source: Any = _inside(root, path, self._largest) if root and path else content
        try:
            if isinstance(source, Path) and not source.is_dir():
                # Copied once, here. Without its origin: the store would read the file again.
                source = AdapterSource(replace(read_source(AdapterSource(source)), origin=None))
            self._compiled.load_adapter(source, name)
        except LorafxError as error:
            field = "lora_path" if content is None else None
            raise RequestError(message_of(error), field) from error
        text = f"Success: LoRA adapter '{name}' added successfully."
        version = str(self._compiled.adapter_versions.get(name))
        return PlainTextResponse(text, headers={"X-Adapter-Version": version})

    def unload(self, body: dict[str, Any]) -> str:
        """Unload `lora_name`; returns the answer. Its running requests are answered to the end.
        Raises RequestError if there is no such adapter."""
        if not self._controlled:
            self._folder_or_refuse()
        name, loaded = _text(body, "lora_name"), self._compiled.adapters
        if name not in loaded:
            raise RequestError(
                f"no adapter {name!r:.200} is loaded{nearest(name, loaded)}", status=404
            )
        self._compiled.unload_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _folder_or_refuse(self) -> Path:
        if self._loads is None:
            raise RequestError(
                "this server loads and unloads no adapters on request; "
                "`lorafx serve --allow-runtime-loading` does",
                status=403,
            )
        return self._loads

    async def find(self, name: str) -> None:
        """Have an adapter loaded if it has a folder and is not loaded yet. Requests for one adapter
        wait for one reading, and others go on. Raises RequestError if it is refused."""
        root, known = self._finds, self._compiled.adapters
        if root is None or name in known or adapter_folder(root, name) is None:
            return
        reading = self._readings.get(name)
        if reading is None:
            reading = self._readings[name] = asyncio.create_task(self._read(root, name))
            reading.add_done_callback(lambda _: self._readings.pop(name))
        await asyncio.shield(reading)  # others may wait for it when this client goes away

    async def _read(self, root: Path, name: str) -> None:
        async with self._limit:
            try:
                folder = await asyncio.to_thread(_inside, root, name)
                await asyncio.to_thread(self._compiled.load_adapter, folder, name)
            except LorafxError as error:
                raise RequestError(
                    f"the adapter {name!r} has a folder and is not served: {message_of(error)}",
                    "model",
                ) from error


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RequestError(f"`{field}` is a non-empty string; got {value!r:.80}", field)
    return value


def _inside(root: Path, path: str, largest: int = 0) -> Path:
    """The folder `path`, relative to `root`, or a file of safetensors of at most `largest` bytes.
    Raises RequestError unless it is in `root` with its files, or the configuration beside it, after
    all links have been followed; the error does not tell what is elsewhere."""
    outside = RequestError(
        f"{path!r:.200} is not inside the folder that adapters are loaded from",
        "lora_path",
        status=403,
    )
    try:
        found = (root / path).resolve()
        if not found.is_relative_to(root):
            raise outside
        single = found.suffix == ".safetensors" and found.is_file()  # pipes may have no end
        if not single and not found.is_dir():
            text = f"there is no folder and no file *.safetensors {path!r:.200}"
            raise RequestError(text, "lora_path", status=404)
        read = [found.parent / CONFIG] if single else found.iterdir()
        if any(not file.resolve().is_relative_to(root) for file in read):
            raise outside
        if single and found.stat().st_size > largest:
            text = f"{path!r:.200} has more than {largest} bytes, which --max-upload-bytes allows"
            raise RequestError(text, "lora_path", status=413)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # links in a loop, a long name
        raise outside from error
    return found
