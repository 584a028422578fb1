"""An adapter as one file, which a trainer writes again and again for a server beside it to read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store.peft_config import raw_fields
from lorafx.adapter_store.untrusted_files import dense_tensors
from lorafx.errors import CheckpointError

#: Names of safetensors.
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_adapter(
    file: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Any,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter as a file of safetensors. It is written in place, into pages that are there:
    in /dev/shm that takes a third of the time of a new file. Whoever reads meanwhile is told so.

    Args:
        file: its path, which ends in .safetensors.
        tensors: by name, such as `peft.get_peft_model_state_dict(peft_model)`.
        config: the `peft.LoraConfig`, or the fields of its adapter_config.json.
        dtype: the dtype of the numbers in the file; by default their own. That of the served base
            loses nothing, since the server rounds to it.

    Raises:
        CheckpointError: a tensor is sharded, sparse or quantised, or has no floating-point numbers.
    """
    where = f"what is to be in {os.fspath(file)}"
    dense, offset = dense_tensors(tensors, where), 0
    fields = json.dumps(raw_fields(config)[0], default=_plain)
    header: dict[str, Any] = {"__metadata__": {"adapter_config": fields}}
    dtypes = {key: dtype or tensor.dtype for key, tensor in dense.items()}
    order = sorted(dense, key=lambda key: -dtypes[key].itemsize)  # so that all are aligned
    for key in order:
        if dtypes[key] not in _NAMES:
            raise CheckpointError(f"{where}: {key!r:.200} is {dtypes[key]}; give dtype=")
        end = offset + dense[key].numel() * dtypes[key].itemsize
        entry = {"dtype": _NAMES[dtypes[key]], "shape": [*dense[key].shape]}
        header[key], offset = {**entry, "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.open(file, os.O_RDWR | os.O_CREAT), "r+b") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            numbers = dense[key].to("cpu", dtypes[key]).reshape(-1).view(torch.uint8)
            content.write(numbers.numpy().data)
        content.truncate()


def _plain(value: Any) -> Any:
    """A field of a configuration that JSON does not have."""
    return sorted(value) if isinstance(value, set) else getattr(value, "__dict__", str(value))
