"""From a source of an adapter to its tensors and its configuration.

    a folder                        adapter_config.json beside a file of one of `WEIGHTS`, or of any
                                    name where there is no other
    a file                          safetensors or a pickle of tensors, told by its first bytes
    owner/name                      on the Hugging Face hub, by huggingface_hub
    bytes, or tensors by name       in memory

Files are not trusted: reading them yields tensors or a CheckpointError, and takes memory in
proportion to their size. Names inside a file are never taken for paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from lorafx.adapter_store.config_source import CONFIG_FILE, raw_fields
from lorafx.adapter_store.hub import downloaded, is_repository
from lorafx.adapter_store.origins import OpenedSource, stamp
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.pickled import load_pickled, unlike_plain, unpickled
from lorafx.adapter_store.saved import AdapterSource, Saved
from lorafx.errors import CheckpointError
from lorafx.interrupts import undisturbed

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
#: Names that libraries give to the weights: PEFT, mlx-lm, diffusers.
WEIGHTS = (
    SAFETENSORS,
    PICKLED,
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
#: Keys of a safetensors file's metadata under which a configuration lies, as JSON.
_METADATA = ("adapter_config", CONFIG_FILE, "peft_config")
_LONGEST_NAME = 1024


def opened(asked: AdapterSource) -> Saved:
    """The tensors and the configuration that `asked` names.

    Raises:
        CheckpointError: absent, truncated, or of another format.
        UnsupportedAdapterError: a PEFT configuration that lorafx cannot honour.
    """
    if isinstance(asked, OpenedSource):
        return replace(asked.saved, component=asked.component)
    source = asked.source
    if isinstance(source, Mapping):
        return _in_memory(asked, source)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        return _saved(asked, *_from_bytes(content), f"{len(content)} bytes", None)
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            "an adapter is read from a folder, a file, a name on the hub, bytes or a mapping of "
            f"tensors, not from a {type(source).__name__}"
        )
    path = Path(source)
    if isinstance(source, str) and is_repository(source):
        path = downloaded(source, asked.revision)
    try:
        single = path.is_file()
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    if single:
        fields, before = None, _stamps([path, path.parent / CONFIG_FILE])
        if path.name in WEIGHTS and (path.parent / CONFIG_FILE).is_file():
            fields = _checked(raw_fields(path.parent)) if asked.config is None else None
        tensors, metadata = _tensors(path)
        _check_unchanged(path, before)
        return _saved(asked, tensors, metadata, str(path), fields)
    return _of_folder(asked, path)


def _of_folder(asked: AdapterSource, folder: Path) -> Saved:
    """What a folder holds; its configuration is checked before its weights are read."""
    fields, problem = None, None
    before = _stamps(_candidates(folder))
    if asked.config is None:
        try:
            fields = _checked(raw_fields(folder))
        except CheckpointError as error:
            if not folder.is_dir() or (folder / CONFIG_FILE).exists():
                raise
            problem = error  # other dialects have none
    file = _weights(folder, problem)
    tensors, metadata = _tensors(file)
    _check_unchanged(file, before)
    saved = _saved(asked, tensors, metadata, str(file), fields)
    if saved.fields is None and problem is not None and file.name in (SAFETENSORS, PICKLED):
        raise problem
    return saved


def _stamps(files: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    """These files as they are now, by name; not those that are absent."""
    found = {}
    for file in files:
        with suppress(OSError, ValueError):  # the reader says that better
            found[file.name] = stamp(file.stat())
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    """The files in `folder` of which an adapter may consist."""
    with suppress(OSError, ValueError):
        for file in folder.iterdir():
            if file.name == CONFIG_FILE or file.suffix in _SUFFIXES:
                yield file


def _check_unchanged(file: Path, before: Mapping[str, tuple[int, int, int]]) -> None:
    """Raise CheckpointError where the weights, or the configuration beside them, are not what they
    were before they were read: α may be that of one version, and what it scales that of another."""
    for name, now in _stamps([file, file.parent / CONFIG_FILE]).items():
        if before.get(name) != now:
            raise CheckpointError(
                f"{file.parent / name} was written while the adapter was read, which may be half "
                "of one version and half of another; load it again when it is complete"
            )


def _checked(found: tuple[dict[str, Any], str]) -> PeftConfig | dict[str, Any]:
    """The fields, as PEFT's configuration where they are one: what it asks for is refused before
    anything large is read."""
    fields, where = found
    return PeftConfig.read(fields, where=where) if "peft_type" in fields else fields


def _saved(
    asked: AdapterSource,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    where: str,
    fields: Any,
) -> Saved:
    _check_names(where, tensors)
    if asked.config is not None:
        fields = asked.config
        if not isinstance(fields, PeftConfig):
            fields = _checked(raw_fields(fields))
    elif fields is None:
        fields = _in_metadata(metadata, where)
    return Saved(tensors, fields, metadata, where, asked.component)


def _in_metadata(metadata: Mapping[str, str], where: str) -> PeftConfig | dict[str, Any] | None:
    for key in _METADATA:
        if key in metadata:
            fields = json_object(metadata[key], f"{key} in the metadata of {where}")
            return _checked((fields, f"{key} in the metadata of {where}"))
    return None


def json_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`; CheckpointError where it holds none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read as JSON: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what} must hold a JSON object, it is {text:.80}")
    return values


def _in_memory(asked: AdapterSource, tensors: Mapping[str, Any]) -> Saved:
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
    return _saved(asked, {key: t.detach() for key, t in tensors.items()}, {}, where, None)


def _weights(folder: Path, problem: CheckpointError | None) -> Path:
    """The file in `folder` that holds the weights."""
    try:
        for name in WEIGHTS:
            if (folder / name).is_file():  # not a pipe or a device, which have no end
                return folder / name
        names = sorted(p.name for p in folder.iterdir())
        others = [n for n in names if n.endswith(_SUFFIXES) and (folder / n).is_file()]
    except OSError as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    if len(others) == 1:
        return folder / others[0]
    if problem is not None and not others:
        raise problem
    found = ", ".join(names[:20]) or "nothing"
    if others:
        raise CheckpointError(
            f"{folder} holds several files that may be the adapter ({', '.join(others[:20])}); "
            "give the path of one"
        )
    raise CheckpointError(
        f"{folder} holds no adapter weights: neither {SAFETENSORS} nor {PICKLED} (it holds {found})"
    )


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file, and its metadata."""
    try:
        with file.open("rb") as content:
            pickle = not _is_safetensors(content.read(9))
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc}") from exc
    if pickle and file.suffix != ".safetensors":
        return load_pickled(file), {}
    with _reading(str(file), file):
        # torch takes an interrupt in the middle for a value that has no shape.
        tensors = undisturbed(lambda: load_file(file, device="cpu"))
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
    return tensors, metadata


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins as safetensors do: the header's length in eight bytes, then JSON."""
    return start[8:] == b"{"


def _from_bytes(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not _is_safetensors(content[:9]):
        return unpickled(content), {}
    where = f"{len(content)} bytes"
    with _reading(where, None):
        tensors = undisturbed(lambda: load(content))
        # The header, which has just been read.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__", {})


@contextmanager
def _reading(where: str, file: Path | None) -> Iterator[None]:
    """What goes wrong inside is a file that is no safetensors: headers may claim anything, and what
    the library or torch make of a size of 2**63 is their affair."""
    try:
        yield
    except Exception as exc:
        size = f" ({file.stat().st_size} bytes)" if file is not None and file.is_file() else ""
        raise CheckpointError(
            f"{where}{size} is not a readable safetensors file, truncated or of another "
            f"format: {exc}; save or download the adapter again"
        ) from exc


def _check_names(where: str, names: Iterable[str]) -> None:
    """Names are compared with the model's by what takes time for long ones."""
    longest = max(names, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(
            f"{where} names a tensor by {len(longest)} characters: {longest[:80]}…; names may have "
            f"{_LONGEST_NAME}"
        )
