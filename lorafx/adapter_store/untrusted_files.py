"""Tensors from files that are not trusted, or a CheckpointError, with memory proportional to the
size of the file.

`torch.load(weights_only=True)` runs no code, but inflates compressed entries of any size, lets a
tensor claim more numbers than were saved, and fails in many ways on damaged pickles. So the sizes
of entries and tensors are compared with the size of the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from lorafx.errors import CheckpointError
from lorafx.interrupts import undisturbed
from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass

#: Tensors by name, and metadata.
Contents = tuple[dict[str, Tensor], dict[str, str]]


def dense_tensors(tensors: Any, where: str) -> dict[str, Tensor]:
    """Dense tensors by name; CheckpointError for anything else."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{where} does not hold a mapping from names to tensors")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{where} does not hold a mapping from names to tensors; it has {key!r:.80}: of "
                f"class {type(tensor).__name__}"
            )
        fault = _why_not_dense(tensor)
        if fault is not None:
            raise CheckpointError(f"{where}: {key[:200]!r} {fault}; save it as a dense tensor")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def unsound(tensor: Tensor) -> int:
    """How many numbers are NaN or infinite. torch.isfinite takes 13 times as long as the bounds."""
    if not tensor.numel() or all(math.isfinite(bound.item()) for bound in tensor.aminmax()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def read_file(file: Path) -> Contents:
    try:
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            if not _is_safetensors(content.read(9)) and file.suffix != ".safetensors":
                return _load_pickled(content, str(file)), {}
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc}") from exc

    def read() -> Contents:
        # Read, not mapped: what is cut short while it is mapped ends the process with SIGBUS.
        with safe_open(file, framework="pt", backend="pread") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
            return tensors, content.metadata() or {}

    return _safetensors(read, f"{file} ({size} bytes)")


def read_bytes(content: bytes) -> Contents:
    where = f"{len(content)} bytes"
    if not _is_safetensors(content[:9]):
        return _load_pickled(io.BytesIO(content), where), {}

    def read() -> Contents:
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        return load(content), json.loads(header).get("__metadata__", {})

    return _safetensors(read, where)


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins with an eight-byte header length, then JSON."""
    return start[8:] == b"{"


def _safetensors(read: Callable[[], Contents], where: str) -> Contents:
    try:
        # Interrupted in here, torch would take a value for one without a shape.
        return undisturbed(read)
    except Exception as exc:  # headers may claim anything, such as a size of 2**63
        raise CheckpointError(
            f"{where} is not a readable safetensors file, truncated or of another format: {exc}; "
            "save or download the adapter again"
        ) from exc


def _load_pickled(content: BinaryIO, file: str) -> dict[str, Tensor]:
    """The plain tensors in `content` by name, within its size; CheckpointError names `file`."""
    try:
        stored_bytes = _stored_bytes(content, file)
        tensors = torch.load(content, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # Damaged pickles raise any exception: KeyError, IndexError, MemoryError.
    except Exception as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise CheckpointError(
            f"{file} cannot be read with weights_only=True ({reason:.200}); it is "
            "truncated, or holds objects other than tensors: save the adapter again as "
            "adapter_model.safetensors"
        ) from exc
    dense = dense_tensors(tensors, file)
    _check_claims(file, dense, stored_bytes)
    return dense


def _stored_bytes(content: BinaryIO, file: str) -> int:
    """The most bytes of numbers that the file can contain."""
    size = content.seek(0, io.SEEK_END)
    content.seek(0)
    archive = content.read(2) == b"PK"
    content.seek(0)
    if not archive:
        return size  # the format from before torch 1.6: numbers follow the pickle
    with zipfile.ZipFile(content) as entries:
        infos = entries.infolist()
    content.seek(0)
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise CheckpointError(
            f"{file} is a compressed archive, which torch.save never writes; save the adapter again"
        )
    stored = sum(info.file_size for info in infos)
    if stored > size:
        raise CheckpointError(
            f"{file} has {size} bytes and lists entries of {stored} bytes; save the adapter again"
        )
    return stored


def _why_not_dense(tensor: Tensor) -> str | None:
    """Why `tensor` is not a dense tensor with values, or None if it is."""
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout is not torch.strided:
        return f"is a sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return f"is a quantised tensor ({tensor.dtype})"
    if tensor.is_meta:
        return "is on the device meta and holds no values"
    return None


def _check_claims(file: str, tensors: dict[str, Tensor], limit: int) -> None:
    """Raise CheckpointError for more numbers than were saved, by zero strides or large storages."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    claimed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > limit:
        raise CheckpointError(f"{file}: its tensors claim {claimed} bytes, but it holds {limit}")
    for key, tensor in tensors.items():
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file}: {key[:200]!r} has shape {tuple(tensor.shape)}, which is more than "
                "its saved storage; save it as a contiguous tensor"
            )
