"""Tensors of an untrusted pickled adapter (`adapter_model.bin`).

`torch.load(weights_only=True)` runs no code, but inflates compressed entries of any size, lets a
tensor claim more numbers than were saved, and fails in many ways on damaged pickles. Here memory is
bounded by the file's size, and the result is plain dense tensors or a CheckpointError.
"""

from __future__ import annotations

import io
import zipfile
from typing import BinaryIO

import torch
from torch import Tensor

from lorafx.errors import CheckpointError
from lorafx.torch_internals.subclasses import is_traceable_wrapper_subclass


def load_pickled(content: BinaryIO, file: str) -> dict[str, Tensor]:
    """The plain tensors in `content` by name, within its size; CheckpointError names `file`."""
    try:
        held = _held(content, file)
        tensors = torch.load(content, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # Damaged pickles raise anything: KeyError, IndexError, MemoryError.
    except Exception as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise CheckpointError(
            f"{file} cannot be read with weights_only=True ({reason:.200}); it is "
            "truncated, or holds objects other than tensors: save the adapter again as "
            "adapter_model.safetensors"
        ) from exc
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors")
    for key, tensor in tensors.items():
        unlike = unlike_plain(tensor)
        if unlike is not None:
            raise CheckpointError(f"{file}: {key[:200]!r} {unlike}; save it as a dense tensor")
    _check_claims(file, tensors, held)
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _held(content: BinaryIO, file: str) -> int:
    """Bytes of numbers that the file can contain."""
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
    held = sum(info.file_size for info in infos)
    if held > size:
        raise CheckpointError(
            f"{file} has {size} bytes and lists entries of {held} bytes; save the adapter again"
        )
    return held


def unlike_plain(tensor: Tensor) -> str | None:
    """Why `tensor` is not dense with values, if it is not."""
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


def _check_claims(file: str, tensors: dict[str, Tensor], held: int) -> None:
    """Refuse more numbers than were saved, by zero strides or grown storages."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    claimed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > held:
        raise CheckpointError(f"{file}: its tensors claim {claimed} bytes, but it holds {held}")
    for key, tensor in tensors.items():
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file}: {key[:200]!r} has shape {tuple(tensor.shape)}, which is more than "
                "its saved storage; save it as a contiguous tensor"
            )
