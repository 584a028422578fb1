"""Reads the tensors and the configuration of an adapter from its source, without interpreting them.

    source ─▶ Saved, in a dialect ─▶ AdapterState, in PEFT's names

    a folder                        adapter_config.json beside a file of `WEIGHTS`, or of any name
    a file                          safetensors or a pickle of tensors, by its first bytes
    owner/name                      on the Hugging Face hub, by huggingface_hub
    bytes, or tensors by name       in memory

Names inside a file are never used as paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.field_checks import json_object
from lorafx.adapter_store.peft_config import CONFIG_FILE, PeftConfig, raw_fields
from lorafx.adapter_store.untrusted_files import Contents, dense_tensors, read_bytes, read_file
from lorafx.errors import CheckpointError, ConfigError

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
#: Names of weight files by PEFT, mlx-lm, diffusers.
WEIGHTS = (
    SAFETENSORS,
    PICKLED,
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
#: Metadata keys of a safetensors file that may hold a JSON configuration.
_METADATA = ("adapter_config", CONFIG_FILE, "peft_config")
_LONGEST_NAME = 1024
#: An owner and a name on the Hugging Face hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: Only these files of a repository are downloaded.
_DOWNLOADED = ["adapter_*", "adapters.safetensors", "pytorch_lora_weights.*", "*.safetensors"]
#: Inode, bytes, and mtime in ns: any rewrite of a file changes it.
Stamp: TypeAlias = tuple[int, int, int]
#: Read as float32, which has all their values.
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """Where an adapter comes from, with settings that its files lack; accepted wherever the folder
    of an adapter is.

    Attributes:
        source: a folder; a file (safetensors, or a pickle of tensors); a name on the Hugging Face
            hub ("owner/name"); the bytes of a file; or tensors by name.
        config: the fields of its dialect's configuration (adapter_config.json's) or a
            `peft.LoraConfig`; default: the one beside the tensors, or in safetensors metadata.
        dialect: "peft", "diffusers", "kohya", "mlx" or "loralib"; default: told by the keys. Of
            diffusers' and kohya's, dotted prefixes name components even beside a configuration.
        component: the component of a pipeline that this model is ("unet", "transformer",
            "text_encoder", ...); default: told by the names.
        key_mapping: regular expressions and replacements in module paths, applied in order, as in
            transformers' `from_pretrained`.
        revision: branch, tag or commit on the hub.
        prefix: the path in the files of what this model is, such as "vision_tower"; or such a path
            and what it is here, ("vision_tower", "encoder"), "" for all. Applied before
            `key_mapping`.
        ignore: regular expressions; tensors with a match in their keys are left out.

    `config`, `key_mapping` and `ignore` are copied, since an adapter may be read again later.
    """

    source: str | os.PathLike[str] | bytes | Mapping[str, Tensor] | Saved
    config: Any = None
    dialect: str | None = None
    component: str | None = None
    key_mapping: Mapping[str, str] | None = None
    revision: str | None = None
    prefix: str | tuple[str, str] | None = None
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("config", "key_mapping", "ignore"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, deepcopy(dict(value)))
            elif is_dataclass(value) or name == "ignore":  # a configuration of PEFT's
                object.__setattr__(self, name, deepcopy(value))


Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Tensor] | AdapterSource"


class Made(NamedTuple):
    """The `method` and the keys and shapes that a factor was made `of`, or the `weight` in whose
    place a tensor without numbers stands."""

    method: str
    of: str
    weight: ChangedWeight | None = None

    def __str__(self) -> str:
        return f"{self.method}, of {self.of}"


@dataclass(frozen=True)
class Saved:
    """A source's tensors by key, its configuration and metadata; `where` names it in messages."""

    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any] | PeftConfig | None
    metadata: Mapping[str, str]
    where: str
    component: str | None = None
    origin: Origin | None = None
    #: By the key of a factor or of a changed weight.
    made: Mapping[str, Made] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterState:
    """An adapter's configuration and its tensors by PEFT's keys.

    Attributes:
        where: its name in messages.
        scales: s by module path, overriding the configuration.
        left_out: other components of a pipeline with factors in its file.
        lost: keys of its file that nothing here was made of.
        paths: module paths as they were saved, which patterns match, by their mapped ones.
        made: what was made of tensors of another method, by the key of a factor or weight.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    where: str
    scales: Mapping[str, float] = field(default_factory=dict)
    dialect: str = "peft"
    left_out: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)


class Origin(NamedTuple):
    """Where an adapter can be read again: its absolute path, the settings for reading it, and a
    stamp of each of its files."""

    source: AdapterSource
    path: Path
    files: Mapping[str, Stamp]

    def check(self, name: str) -> None:
        """Raise CheckpointError if a file has changed."""
        stamps = _stamps(self.path)
        for file in sorted({*self.files, *stamps}):
            old, new = self.files.get(file), stamps.get(file)
            if old is None or new is None:
                change = f"{file} is {'new' if old is None else 'gone'}"
            elif old[1] != new[1]:
                change = f"{file} had {old[1]} bytes and has {new[1]}"
            else:
                change = f"{file} was written again"
            if old != new:
                raise CheckpointError(
                    f"adapter {name!r} has to be read again, because "
                    "LoraConfig(max_host_bytes=...) left no room for it in host memory, and "
                    f"{self.path} is not what it was: {change}. load_adapter() loads what is there "
                    "now"
                )


def origin_of(source: Any) -> Origin | None:
    """The origin of `source`; None if it is in memory or on the hub."""
    adapter = source if isinstance(source, AdapterSource) else AdapterSource(source)
    if isinstance(adapter.source, Saved):
        old = adapter.source.origin
        return old and old._replace(source=replace(old.source, component=adapter.component))
    if not isinstance(adapter.source, (str, os.PathLike)) or not os.path.exists(adapter.source):
        return None
    path = Path(os.path.abspath(adapter.source))
    return Origin(replace(adapter, source=path), path, _stamps(path))


def _stamps(path: Path) -> dict[str, Stamp]:
    try:
        if path.is_dir():
            kinds = (".json", *SUFFIXES)
            files = [file for file in path.iterdir() if file.suffix in kinds and file.is_file()]
        else:
            beside = path.parent / CONFIG_FILE
            files = [path, beside] if beside.is_file() else [path]
        stats = {file.name: file.stat() for file in files}
    except (OSError, ValueError):  # ValueError: a null byte, which no path has
        return {}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def read_source(adapter: AdapterSource) -> Saved:
    """Tensors and configuration of `adapter`; raises CheckpointError or UnsupportedAdapterError."""
    source = adapter.source
    if isinstance(source, Saved):
        return replace(source, component=adapter.component)
    if isinstance(source, Mapping):
        where = "the given mapping"
        return _saved(adapter, (dense_tensors(source, where), {}), where, None)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        return _saved(adapter, read_bytes(content), f"{len(content)} bytes", None)
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            "an adapter is read from a folder, a file, a name on the hub, bytes or a mapping of "
            f"tensors, not from a {type(source).__name__}"
        )
    path = Path(source)
    if isinstance(source, str) and is_hub_name(source) and not os.path.lexists(source):
        path = _download(source, adapter.revision)
    return _read_path(adapter, path)


def is_hub_name(source: str) -> bool:
    """Whether `source` reads "owner/name"."""
    return _HUB_NAME.fullmatch(source) is not None


def _download(name: str, revision: str | None) -> Path:
    """The folder of the repository's snapshot; CheckpointError if huggingface_hub cannot get it."""
    absent = f"adapter folder {name} does not exist here"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{absent}; adapters on the hub need huggingface_hub: pip install 'lorafx[hf]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # network, HTTP or hub errors
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{absent}, and {name!r} cannot be had from the hub: {reason:.300}"
        ) from error


def _read_path(adapter: AdapterSource, path: Path) -> Saved:
    before = _stamps(path)
    try:
        single, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    if not exists:
        advice = (
            "give the name as a string to have it looked for on the hub"
            if is_hub_name(str(path))
            else 'name a folder or a file, or an adapter on the hub ("owner/name")'
        )
        raise CheckpointError(f"adapter folder {path} does not exist; {advice}")
    folder = path.parent if single else path
    configured = (folder / CONFIG_FILE).exists() and (not single or path.name in WEIGHTS)
    fields = None
    if adapter.config is None and (configured or not folder.is_dir()):
        fields = _parse_if_peft(*raw_fields(folder))
    file = path if single else weights_file(folder)
    contents = read_file(file)
    after = _stamps(path)
    for name in (file.name, CONFIG_FILE):  # α and factors have to be of the same version
        if before.get(name) != after.get(name):
            raise CheckpointError(
                f"{folder / name} was written while the adapter was read, which may be half of one "
                "version and half of another; load it again when it is complete"
            )
    origin = origin_of(adapter)
    origin = origin and origin._replace(files=before)
    return replace(_saved(adapter, contents, str(file), fields), origin=origin)


def _parse_if_peft(fields: dict[str, Any], where: str) -> PeftConfig | dict[str, Any]:
    """`fields`, parsed if they are PEFT's: unsupported ones are refused before weights are read."""
    if "peft_type" not in fields:
        return fields
    return PeftConfig.read(fields, where=where, methods=True)


def _saved(adapter: AdapterSource, contents: Contents, where: str, fields: Any) -> Saved:
    tensors, metadata = contents
    tensors = {
        key: tensor.float() if tensor.dtype in _FLOAT8 else tensor
        for key, tensor in _without_ignored(tensors, adapter.ignore, where).items()
    }
    # Long names take long to compare with the model's.
    longest = max(tensors, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(
            f"{where} names a tensor by {len(longest)} characters: {longest[:80]}…; names may have "
            f"{_LONGEST_NAME}"
        )
    if adapter.config is not None:
        fields = adapter.config
        if not isinstance(fields, PeftConfig):
            fields = _parse_if_peft(*raw_fields(fields))
    elif fields is None:
        key = next((key for key in _METADATA if key in metadata), None)
        if key is not None:
            what = f"{key} in the metadata of {where}"
            fields = _parse_if_peft(json_object(metadata[key], what), what)
    return Saved(tensors, fields, metadata, where, adapter.component)


def _without_ignored(tensors: dict[str, Tensor], ignore: Any, where: str) -> dict[str, Tensor]:
    """The tensors that no pattern matches; ConfigError for a pattern that none has."""
    for pattern in ignore if isinstance(ignore, list | tuple | set) else [ignore]:
        try:
            kept = {key: t for key, t in tensors.items() if not re.search(pattern, key)}
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"ignore: {pattern!r:.80} is no regular expression: {error}"
            ) from None
        if len(kept) == len(tensors):
            first = f"{next(iter(tensors), '')!r:.200}"
            raise ConfigError(f"ignore: {pattern!r} matches no key in {where}, such as {first}")
        tensors = kept
    return tensors


def weights_file(folder: Path) -> Path:
    """The file with the tensors of an adapter's folder. Raises CheckpointError without a certain
    one."""
    try:
        for name in WEIGHTS:
            if (folder / name).is_file():  # pipes and devices may have no end
                return folder / name
        names = sorted(p.name for p in folder.iterdir())
        candidates = [n for n in names if n.endswith(SUFFIXES) and (folder / n).is_file()]
    except OSError as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    if len(candidates) == 1:
        return folder / candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder} holds several files that may be the adapter ({', '.join(candidates[:20])}); "
            "give the path of one"
        )
    subfolders = ", ".join(sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}")))
    raise CheckpointError(
        f"{folder} holds no adapter weights: neither {SAFETENSORS} nor {PICKLED} (it holds "
        f"{', '.join(names[:20]) or 'nothing'})"
        + (f"; its subfolders with adapters are {subfolders}" if subfolders else "")
    )
