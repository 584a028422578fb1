"""Adapter weights as they were saved: a folder's file, or tensors that are in memory already.

`adapter_model.safetensors` is preferred; `adapter_model.bin` is a pickle (lorafx.adapter_store.
pickled). Files are not trusted: reading them yields tensors or a CheckpointError, and takes memory
in proportion to their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.pickled import load_pickled
from lorafx.errors import CheckpointError
from lorafx.interrupts import undisturbed

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_LONGEST_NAME = 1024


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
    return AdapterState(config, _tensors(file), str(file))


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.name == PICKLED:
        tensors = load_pickled(file)
    else:
        with _reading(file):
            # torch takes an interrupt in the middle for a value that has no shape.
            tensors = undisturbed(lambda: load_file(file, device="cpu"))
    _check_names(file, tensors)
    return tensors


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What goes wrong inside is a file that is no safetensors: headers may claim anything, and what
    the library or torch make of a size of 2**63 is their affair."""
    try:
        yield
    except Exception as exc:
        raise _unreadable(file, exc) from exc


def _check_names(file: Path, names: Iterable[str]) -> None:
    """Names are compared with the model's by what takes time for long ones."""
    longest = max(names, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(
            f"{file} names a tensor by {len(longest)} characters: {longest[:80]}…; names may have "
            f"{_LONGEST_NAME}"
        )


def _open(source: Any) -> tuple[PeftConfig, Path]:
    """The folder's configuration and the file that holds its weights."""
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"an adapter is read from a folder, not from {source!r:.120}")
    folder = Path(source)
    config = PeftConfig.read(folder)
    try:
        for name in (SAFETENSORS, PICKLED):
            if (folder / name).is_file():  # not a pipe or a device, which have no end
                return config, folder / name
        names = sorted(p.name for p in folder.iterdir())
    except OSError as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    found = ", ".join(names[:20]) or "nothing"
    raise CheckpointError(
        f"{folder} holds no adapter weights: neither {SAFETENSORS} nor {PICKLED} (it holds {found})"
    )


def _unreadable(file: Path, exc: Exception) -> CheckpointError:
    size = file.stat().st_size if file.is_file() else 0
    return CheckpointError(
        f"{file} ({size} bytes) is not a readable safetensors file, truncated or of another "
        f"format: {exc}; save or download the adapter again"
    )
