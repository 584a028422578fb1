"""Adapters that clients load and unload, from one folder and only where that is switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafx.adapter_store.names import BASE
from lorafx.errors import LorafxError, nearest
from lorafx.server.errors import RequestError, message_of
from lorafx.server.served_model import ServedModel
from lorafx.server.settings import UNPRINTABLE


class AdapterLoading:
    """What /v1/load_lora_adapter and /v1/unload_lora_adapter do. Adapters lie in `root`; without it
    nothing is loaded or unloaded."""

    def __init__(self, served: ServedModel, root: Path | None) -> None:
        self._served = served
        self._root = None if root is None else root.resolve()

    def load(self, body: dict[str, Any]) -> str:
        """Load the adapter in folder `lora_path` as `lora_name`, and say so."""
        root = self._allowed()
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        compiled = self._served.compiled
        if not name.isprintable():
            raise _bad_name(f"`lora_name` {UNPRINTABLE}; got {name!r}")
        if name == BASE:
            raise _bad_name(f"{BASE!r} is the base model")
        if name in compiled.adapters and body.get("load_inplace") is not True:
            raise _bad_name(
                f"an adapter {name!r} is loaded; unload it first, or send "
                '"load_inplace": true to replace it'
            )
        folder = _inside(root, path)
        try:
            compiled.load_adapter(folder, name)
        except LorafxError as error:
            raise RequestError(400, message_of(error), param="lora_path") from error
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        """Unload `lora_name`, and say so. Requests that it is serving go on."""
        self._allowed()
        name = _text(body, "lora_name")
        compiled = self._served.compiled
        if name not in compiled.adapters:
            raise RequestError(
                404, f"no adapter {name!r} is loaded{nearest(name, compiled.adapters)}"
            )
        compiled.unload_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _allowed(self) -> Path:
        if self._root is None:
            raise RequestError(
                403,
                "this server loads and unloads no adapters on request; "
                "`lorafx serve --allow-runtime-loading` does",
            )
        return self._root


def _bad_name(message: str) -> RequestError:
    return RequestError(400, message, param="lora_name")


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RequestError(400, f"`{field}` is a non-empty string; got {value!r}", param=field)
    return value


def _inside(root: Path, path: str) -> Path:
    """The folder that `path` leads to, relative to `root`, which it and its files have to be in
    after all links have been followed. Where something is elsewhere, the error does not say what
    there is."""
    outside = RequestError(
        403, f"{path!r} is not inside the folder that adapters are loaded from", param="lora_path"
    )
    try:
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise outside
        if not folder.is_dir():
            raise RequestError(404, f"there is no folder {path!r}", param="lora_path")
        if any(not file.resolve().is_relative_to(root) for file in folder.iterdir()):
            raise outside
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise outside from error
    return folder
