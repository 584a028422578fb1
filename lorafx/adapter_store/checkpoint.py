"""Adapter weights as they were saved: a folder's file, or tensors that are in memory already.

`adapter_model.safetensors` is preferred; `adapter_model.bin` is a pickle and is only read with
`weights_only=True`, which builds tensors and nothing else.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterState:
    """An adapter's configuration and its tensors by saved key.

    Attributes:
        config: checked configuration.
        tensors: saved key -> tensor, on the CPU when read from a file.
        where: what messages call it.
        scales: s by module path, where it is known better than from the configuration (an
            adapter in memory may have been rescaled); wins over α and r.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    where: str
    scales: Mapping[str, float] = field(default_factory=dict)


def load_state(source: str | os.PathLike[str] | AdapterState) -> AdapterState:
    """Configuration and tensors of `source`, an adapter folder or a state in memory.

    Raises CheckpointError for folders and files that are absent, truncated or of another format,
    UnsupportedAdapterError for a configuration that lorafx cannot honour.
    """
    if isinstance(source, AdapterState):
        return source
    config, file = _open(source)
    if file.name == PICKLED:
        return AdapterState(config, _load_pickled(file), str(file))
    try:
        return AdapterState(config, load_file(file, device="cpu"), str(file))
    except (SafetensorError, OSError) as exc:
        raise _unreadable(file, exc) from exc


def load_config(source: str | os.PathLike[str] | AdapterState) -> PeftConfig:
    """The configuration alone; errors as those of `load_state`."""
    return source.config if isinstance(source, AdapterState) else _open(source)[0]


def peek_shapes(source: str | os.PathLike[str] | AdapterState) -> dict[str, tuple[int, ...]]:
    """Shape of each saved tensor, without reading the tensors where the format allows it."""
    if isinstance(source, AdapterState):
        return {key: tuple(t.shape) for key, t in source.tensors.items()}
    _, file = _open(source)
    if file.name == PICKLED:
        return {key: tuple(t.shape) for key, t in _load_pickled(file).items()}
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise _unreadable(file, exc) from exc


def _open(source: Any) -> tuple[PeftConfig, Path]:
    """The folder's configuration and the file that holds its weights."""
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"an adapter is read from a folder, not from {source!r:.120}")
    folder = Path(source)
    config = PeftConfig.read(folder)
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return config, folder / name
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} holds no adapter weights: neither {SAFETENSORS} nor {PICKLED} (it holds {found})"
    )


def _load_pickled(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise CheckpointError(
            f"{file} cannot be read with weights_only=True ({reason}); it is truncated, or holds "
            f"more than tensors: save the adapter again as {SAFETENSORS}"
        ) from exc
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors")
    return tensors


def _unreadable(file: Path, exc: Exception) -> CheckpointError:
    size = file.stat().st_size if file.exists() else 0
    return CheckpointError(
        f"{file} ({size} bytes) is not a readable safetensors file, truncated or of another "
        f"format: {exc}; save or download the adapter again"
    )
