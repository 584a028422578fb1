"""Sources of weights: anything that yields (name, tensor) pairs.

    mapping, list, tuple       read as it is
    safetensors file, folder   mapped into memory
    function of no arguments   called twice; it may fill one buffer again and again
    any other iterable         copied to host memory first

All of them can be read twice, and are checked as a whole before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafx.errors import CheckpointError, ConfigError
from lorafx.interrupts import undisturbed

NamedTensors = Iterable[tuple[str, Tensor]]
#: Arguments of `load_weights`.
Weights = Mapping[str, Tensor] | NamedTensors | Callable[[], NamedTensors] | str | os.PathLike[str]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightSource:
    """What `read` gives each time it is called; `stable`: the tensors stay valid."""

    read: Callable[[], Iterable[Any]]
    stable: bool = True

    def pairs(self) -> Iterator[tuple[str, Tensor]]:
        """Its names and tensors, detached. ConfigError for what is no pair of these."""
        for pair in self.read():
            if (
                not isinstance(pair, (tuple, list))
                or len(pair) != 2
                or not isinstance(pair[0], str)
            ):
                raise ConfigError(f"weights are (name, tensor) pairs, got {type(pair).__name__}")
            name, tensor = pair
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
            yield name, tensor.detach()


def source_of(weights: Weights) -> WeightSource:
    """The source of `weights`. CheckpointError for a path without safetensors."""
    if isinstance(weights, (str, os.PathLike)):
        files = _files(Path(weights))
        # torch takes an interrupt in the middle for a value that has no shape.
        tensors = [pair for file in files for pair in undisturbed(partial(_mapped, file))]
        return WeightSource(lambda: tensors)
    if isinstance(weights, Mapping):
        return WeightSource(weights.items)
    if isinstance(weights, Sequence):
        return WeightSource(lambda: weights)
    if isinstance(weights, Iterable):
        copies = [
            (name, tensor.clone() if tensor.device.type == "cpu" else tensor.cpu())
            for name, tensor in WeightSource(lambda: weights).pairs()
        ]
        return WeightSource(lambda: copies)
    if callable(weights):
        return WeightSource(weights, stable=False)
    raise ConfigError(
        "weights are (name, tensor) pairs, a mapping, a path of safetensors, or a function that "
        f"gives pairs; got {type(weights).__name__}"
    )


def _mapped(path: Path) -> list[tuple[str, Tensor]]:
    """The tensors of a file, mapped into memory: nothing is read before it is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors files: {error}") from error
        return [path / name for name in dict.fromkeys(named)]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{path} holds no safetensors file")
    return found
