"""An adapter as it was saved, and the form that all readers take.

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

#: Endings of files that hold tensors.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
#: Inode, bytes, and ns since 1970, by what a file that was written again differs.
Stamp: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """Where an adapter comes from, with what its files do not say.

    It stands wherever an adapter's folder may: among the adapters of `lorafx.compile`, and in
    `load_adapter`.

    Attributes:
        source: a folder; one file (safetensors, or a pickle of tensors); a name on the Hugging Face
            hub ("owner/name"); the bytes of a file; or tensors by name.
        config: the adapter's configuration: a dict of the fields that its dialect's configuration
            has (adapter_config.json's), or a `peft.LoraConfig`. None for what lies beside the
            tensors: adapter_config.json, or the metadata of a safetensors file.
        dialect: "peft", "diffusers", "kohya", "mlx" or "loralib"; None tells it by the keys.
        component: for files with factors for several models of a pipeline, which one this model is
            ("unet", "transformer", "text_encoder", ...). None tells it by the names.
        key_mapping: regular expressions and what replaces them in the paths of modules, one after
            the other, as in transformers' `from_pretrained`, for a model whose modules moved.
        revision: branch, tag or commit on the hub.

    `config` and `key_mapping` are copied: an adapter may be read again later.
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


#: What an adapter may be given as.
Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Tensor] | AdapterSource"


@dataclass(frozen=True)
class Saved:
    """What a source holds: tensors by saved key; the raw fields of the configuration, or one that
    was read, None where there is none; a safetensors file's metadata. Messages call it `where`."""

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
        where: what messages call it.
        scales: s by module path, where it is known better than from the configuration (an adapter
            in memory may have been rescaled; other dialects save α with each module).
        dialect: the dialect that it was saved in.
        left_out: components of a pipeline that its file has factors for besides this model.
        notes: what was decided while it was read, a line each, for the log and `explain`.
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
    """Where an adapter can be read again: a folder, or a file, by its absolute path, with what it
    does not say itself, and a stamp of each file by its name."""

    source: AdapterSource
    path: Path
    files: Mapping[str, Stamp]

    @classmethod
    def of(cls, source: Any) -> Origin | None:
        """The origin of what is about to be read from `source`, or was; None for an adapter in
        memory or on the hub, and for what cannot be listed, which the reader says better."""
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
        """Bytes on the disk."""
        return sum(size for _, size, _ in self.files.values())

    def check(self, name: str) -> None:
        """Raise CheckpointError where the files are not those that adapter `name` was read from."""
        try:
            now = stamps(self.path)
        except OSError as error:
            raise CheckpointError(self._lost(name, str(error))) from error
        for file in {**self.files, **now}:
            old, new = self.files.get(file), now.get(file)
            if old == new:
                continue
            if old is None or new is None:
                what = f"{file} is {'new' if old is None else 'gone'}"
            elif old[1] != new[1]:
                what = f"{file} had {old[1]} bytes and has {new[1]}"
            else:
                what = f"{file} was written again"
            raise CheckpointError(self._lost(name, what))

    def _lost(self, name: str, why: str) -> str:
        return (
            f"adapter {name!r} has to be read again, because LoraConfig(max_host_bytes=...) left "
            f"no room for it in host memory, and {self.path} is not what it was: {why}. "
            "load_adapter() loads what is there now"
        )


def stamps(path: Path) -> dict[str, Stamp]:
    """A stamp of each file of which the adapter at `path`, a folder or a file, may consist."""
    if path.is_dir():
        kinds = (".json", *SUFFIXES)
        files = [file for file in path.iterdir() if file.suffix in kinds and file.is_file()]
    else:
        beside = path.parent / CONFIG_FILE
        files = [path, beside] if beside.is_file() else [path]
    found = {file.name: file.stat() for file in sorted(files)}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found.items()}
