"""From a source of an adapter to its tensors and its configuration.

    a folder                        adapter_config.json beside a file of `WEIGHTS`, or of any name
    a file                          safetensors or a pickle of tensors, by its first bytes
    owner/name                      on the Hugging Face hub, by huggingface_hub
    bytes, or tensors by name       in memory

Untrusted files yield tensors or a CheckpointError, in memory proportional to their size. Names
inside a file are never used as paths.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from lorafx.adapter_store.config_values import CONFIG_FILE, json_object, raw_fields
from lorafx.adapter_store.hub import downloaded, is_repository
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.pickled import load_pickled, unlike_plain
from lorafx.adapter_store.saved import SUFFIXES, AdapterSource, Origin, Saved, Stamp, stamps
from lorafx.errors import CheckpointError
from lorafx.interrupts import undisturbed

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
#: Tensors by name, and metadata.
_Read = tuple[dict[str, Tensor], dict[str, str]]


def opened(given: AdapterSource) -> Saved:
    """Tensors and configuration of `given`; raises CheckpointError or UnsupportedAdapterError."""
    source = given.source
    if isinstance(source, Saved):
        return replace(source, component=given.component)
    if isinstance(source, Mapping):
        return _in_memory(given, source)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        return _saved(given, _from_bytes(content), f"{len(content)} bytes", None)
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            "an adapter is read from a folder, a file, a name on the hub, bytes or a mapping of "
            f"tensors, not from a {type(source).__name__}"
        )
    origin = Origin.of(given)
    path = Path(source)
    if isinstance(source, str) and is_repository(source):
        path = downloaded(source, given.revision)
    return replace(_at(given, path), origin=origin)


def _at(given: AdapterSource, path: Path) -> Saved:
    try:
        single = path.is_file()
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    folder = path.parent if single else path
    before = _stamps(path)
    configured = not single or (path.name in WEIGHTS and (folder / CONFIG_FILE).is_file())
    fields, problem = None, None
    if given.config is None and configured:
        try:
            fields = _checked(*raw_fields(folder))
        except CheckpointError as error:
            if single or not folder.is_dir() or (folder / CONFIG_FILE).exists():
                raise
            problem = error  # which other dialects lack
    file = path if single else _weights(folder, problem)
    read = _from_file(file)
    now = _stamps(path)
    for name in (file.name, CONFIG_FILE):  # α and factors of the same version
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder / name} was written while the adapter was read, which may be half of one "
                "version and half of another; load it again when it is complete"
            )
    saved = _saved(given, read, str(file), fields)
    if saved.fields is None and problem is not None and file.name in (SAFETENSORS, PICKLED):
        raise problem
    return saved


def _stamps(path: Path) -> dict[str, Stamp]:
    try:
        return stamps(path)
    except (OSError, ValueError):  # the reader reports it
        return {}


def _checked(fields: dict[str, Any], where: str) -> PeftConfig | dict[str, Any]:
    """The fields; PEFT's are parsed, so unsupported ones are refused before weights are read."""
    return PeftConfig.read(fields, where=where) if "peft_type" in fields else fields


def _saved(given: AdapterSource, read: _Read, where: str, fields: Any) -> Saved:
    tensors, metadata = read
    # Long names are slow to compare with the model's.
    longest = max(tensors, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(
            f"{where} names a tensor by {len(longest)} characters: {longest[:80]}…; names may have "
            f"{_LONGEST_NAME}"
        )
    if given.config is not None:
        fields = given.config
        if not isinstance(fields, PeftConfig):
            fields = _checked(*raw_fields(fields))
    elif fields is None:
        key = next((key for key in _METADATA if key in metadata), None)
        if key is not None:
            what = f"{key} in the metadata of {where}"
            fields = _checked(json_object(metadata[key], what), what)
    return Saved(tensors, fields, metadata, where, given.component)


def _in_memory(given: AdapterSource, tensors: Mapping[str, Any]) -> Saved:
    where = "the given tensors"
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"an adapter in memory maps names to tensors; it has {key!r:.80}: "
                f"of class {type(tensor).__name__}"
            )
        unlike = unlike_plain(tensor)
        if unlike is not None:
            raise CheckpointError(f"{where}: {key:.200} {unlike}; give a dense tensor")
    return _saved(given, ({key: t.detach() for key, t in tensors.items()}, {}), where, None)


def _weights(folder: Path, problem: CheckpointError | None) -> Path:
    try:
        for name in WEIGHTS:
            if (folder / name).is_file():  # not a pipe or a device, which have no end
                return folder / name
        names = sorted(p.name for p in folder.iterdir())
        others = [n for n in names if n.endswith(SUFFIXES) and (folder / n).is_file()]
    except OSError as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    if len(others) == 1:
        return folder / others[0]
    if problem is not None and not others:
        raise problem
    if others:
        raise CheckpointError(
            f"{folder} holds several files that may be the adapter ({', '.join(others[:20])}); "
            "give the path of one"
        )
    raise CheckpointError(
        f"{folder} holds no adapter weights: neither {SAFETENSORS} nor {PICKLED} (it holds "
        f"{', '.join(names[:20]) or 'nothing'})"
    )


def _from_file(file: Path) -> _Read:
    try:
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            if not _is_safetensors(content.read(9)) and file.suffix != ".safetensors":
                return load_pickled(content, str(file)), {}
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc}") from exc

    def read() -> _Read:
        tensors = load_file(file, device="cpu")
        with safe_open(file, framework="pt") as content:
            return tensors, content.metadata() or {}

    return _safetensors(read, f"{file} ({size} bytes)")


def _from_bytes(content: bytes) -> _Read:
    where = f"{len(content)} bytes"
    if not _is_safetensors(content[:9]):
        return load_pickled(io.BytesIO(content), where), {}

    def read() -> _Read:
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        return load(content), json.loads(header).get("__metadata__", {})

    return _safetensors(read, where)


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins with an eight-byte header length, then JSON."""
    return start[8:] == b"{"


def _safetensors(read: Callable[[], _Read], where: str) -> _Read:
    try:
        # An interrupt inside torch makes it take a value for one without shape.
        return undisturbed(read)
    except Exception as exc:  # headers may claim anything, such as a size of 2**63
        raise CheckpointError(
            f"{where} is not a readable safetensors file, truncated or of another format: {exc}; "
            "save or download the adapter again"
        ) from exc
