"""A saved adapter, and the form that all readers take.

    source ─▶ Saved, in a dialect ─▶ AdapterState, in PEFT's names

Sources: lorafx.adapter_store.opening. Dialects: lorafx.adapter_store.dialects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from lorafx.adapter_store.config_values import CONFIG_FILE
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
#: Inode, bytes, and mtime in ns: any rewrite of a file changes it.
Stamp: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """Where an adapter comes from, with settings that its files lack; accepted wherever an
    adapter's folder is.

    Attributes:
        source: a folder; a file (safetensors, or a pickle of tensors); a name on the Hugging Face
            hub ("owner/name"); the bytes of a file; or tensors by name.
        config: the fields of its dialect's configuration (adapter_config.json's) or a
            `peft.LoraConfig`; default: the one beside the tensors, or in safetensors metadata.
        dialect: "peft", "diffusers", "kohya", "mlx" or "loralib"; default: told by the keys.
        component: the component of a pipeline that this model is ("unet", "transformer",
            "text_encoder", ...); default: told by the names.
        key_mapping: regular expressions and replacements in module paths, applied in order, as in
            transformers' `from_pretrained`.
        revision: branch, tag or commit on the hub.

    `config` and `key_mapping` are copied, since an adapter may be read again later.
    """

    source: str | os.PathLike[str] | bytes | Mapping[str, Tensor] | Saved
    config: Any = None
    dialect: str | None = None
    component: str | None = None
    key_mapping: Mapping[str, str] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("config", "key_mapping"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, deepcopy(dict(value)))
            elif is_dataclass(value):  # PEFT's
                object.__setattr__(self, name, deepcopy(value))


Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Tensor] | AdapterSource"


@dataclass(frozen=True)
class Saved:
    """A source's tensors by key, configuration, and safetensors metadata; `where` in messages."""

    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any] | PeftConfig | None
    metadata: Mapping[str, str]
    where: str
    component: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class AdapterState:
    """An adapter's configuration and its tensors by PEFT's keys.

    Attributes:
        where: its name in messages.
        scales: s by module path, overriding the configuration.
        left_out: other components of a pipeline with factors in its file.
        notes: decisions of the reader, for the log and `explain`.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    where: str
    scales: Mapping[str, float] = field(default_factory=dict)
    dialect: str = "peft"
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where an adapter can be read again: path, settings, and a stamp of each file."""

    source: AdapterSource
    path: Path
    files: Mapping[str, Stamp]

    @classmethod
    def of(cls, source: Any) -> Origin | None:
        """The origin of `source`; None in memory, on the hub, or where it cannot be listed."""
        given = source if isinstance(source, AdapterSource) else AdapterSource(source)
        if isinstance(given.source, Saved):
            known = given.source.origin
            if known is None:
                return None
            return replace(known, source=replace(known.source, component=given.component))
        if not isinstance(given.source, (str, os.PathLike)):
            return None
        path = Path(os.path.abspath(given.source))
        try:
            return cls(replace(given, source=path), path, stamps(path))
        except (OSError, ValueError):  # ValueError: no path at all, with a null byte
            return None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size, _ in self.files.values())

    def check(self, name: str) -> None:
        try:
            now = stamps(self.path)
        except OSError as error:
            raise CheckpointError(self._lost(name, str(error))) from error
        for file in {**self.files, **now}:
            old, new = self.files.get(file), now.get(file)
            if old is None or new is None:
                what = f"{file} is {'new' if old is None else 'gone'}"
            elif old[1] != new[1]:
                what = f"{file} had {old[1]} bytes and has {new[1]}"
            else:
                what = f"{file} was written again"
            if old != new:
                raise CheckpointError(self._lost(name, what))

    def _lost(self, name: str, why: str) -> str:
        return (
            f"adapter {name!r} has to be read again, because LoraConfig(max_host_bytes=...) left "
            f"no room for it in host memory, and {self.path} is not what it was: {why}. "
            "load_adapter() loads what is there now"
        )


def stamps(path: Path) -> dict[str, Stamp]:
    """The stamps of an adapter's files."""
    if path.is_dir():
        kinds = (".json", *SUFFIXES)
        files = [file for file in path.iterdir() if file.suffix in kinds and file.is_file()]
    else:
        beside = path.parent / CONFIG_FILE
        files = [path, beside] if beside.is_file() else [path]
    found = {file.name: file.stat() for file in sorted(files)}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found.items()}
