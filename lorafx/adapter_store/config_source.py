"""The raw fields of an adapter's configuration: from a folder, a mapping or a `peft.LoraConfig`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafx.adapter_store.hub import is_name
from lorafx.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
#: PEFT writes some kilobytes; a path for each module of the largest models takes megabytes.
_LARGEST = 1 << 26


def raw_fields(source: Any) -> tuple[dict[str, Any], str]:
    """The raw fields of `source`, and how to call it in messages.

    Raises:
        CheckpointError: it is absent, unreadable, or of another form.
    """
    if isinstance(source, Mapping):
        values, where = dict(source), "adapter configuration"
    elif dataclasses.is_dataclass(source) and hasattr(source, "peft_type"):
        # Not source.to_dict(), which follows the installed PEFT; private fields are not read.
        names = [f.name for f in dataclasses.fields(source)]
        return {name: getattr(source, name) for name in names}, "peft configuration"
    elif isinstance(source, str | os.PathLike):
        values, where = _load_file(Path(source))
    else:
        raise CheckpointError(
            "an adapter configuration is a folder, a dict or a peft.LoraConfig, not "
            f"{short(source)}"
        )
    if not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} must map field names to values, it is {short(values)}")
    return values, where


def short(value: Any) -> str:
    """The beginning of a value's repr."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # an integer of more digits than Python writes out
        return f"a {type(value).__name__} that is too long to be shown"


def _load_file(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / CONFIG_FILE
    try:
        # A pipe or a device would be waited for, or have no end.
        absent = "" if file.is_file() else _absent(folder)
        size = 0 if absent else file.stat().st_size
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    if absent:
        raise CheckpointError(absent)
    if size > _LARGEST:
        raise CheckpointError(
            f"{file} has {size} bytes, and a configuration may have at most {_LARGEST}"
        )
    deep = False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        deep = True
    except (OSError, ValueError) as exc:  # of JSON, of UTF-8, of integers with too many digits
        raise CheckpointError(f"{file} cannot be read as JSON: {exc}") from exc
    if deep:  # outside of the handler, whose traceback is as long
        raise CheckpointError(f"{file} cannot be read as JSON: its values are nested too deeply")
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds {short(values)}")
    return values, str(file)


def _absent(folder: Path) -> str:
    if not folder.exists():
        where = (
            "give the name as a string to have it looked for on the hub"
            if is_name(str(folder))
            else 'name a folder or a file, or an adapter on the hub ("owner/name")'
        )
        return f"adapter folder {folder} does not exist; {where}"
    if not folder.is_dir():
        return f"{folder} is a file; give the folder that holds it and {CONFIG_FILE}"
    below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
    hint = f"; its subfolders with adapters are {', '.join(below)}" if below else ""
    return f"{folder} has no {CONFIG_FILE}{hint}"
