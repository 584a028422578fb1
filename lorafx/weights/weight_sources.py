"""The sources of checkpoint tensors: mappings, iterables, folders and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafx.errors import CheckpointError, ConfigError
from lorafx.interrupts import undisturbed

NamedTensors = Iterable[tuple[str, Tensor]]
#: Arguments of `load_weights`.
Weights = Mapping[str, Tensor] | NamedTensors | Callable[[], NamedTensors] | str | os.PathLike[str]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightSource:
    """Tensors that `read` yields at each call; `stable`: they stay valid afterwards."""

    read: Callable[[], Iterable[Any]]
    stable: bool = True

    def pairs(self) -> Iterator[tuple[str, Tensor]]:
        """The names and detached tensors. ConfigError for anything but pairs of these."""
        pairs = self.read()
        if not isinstance(pairs, Iterable):
            raise ConfigError(f"weights are (name, tensor) pairs, got {type(pairs).__name__}")
        for pair in pairs:
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
    """A source that can be read twice. CheckpointError for a path without safetensors.

    mapping, list, tuple       read as it is
    safetensors file, folder   mapped into memory
    function of no arguments   called twice; it may fill one buffer again and again
    any other iterable         copied to host memory first
    """
    if isinstance(weights, (str, os.PathLike)):
        files = _files(Path(weights))
        # Interrupted in here, torch would take a value for one without a shape.
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
    if callable(weights) and not isinstance(weights, nn.Module):
        return WeightSource(weights, stable=False)
    raise ConfigError(
        "weights are (name, tensor) pairs, a mapping, a path of safetensors, or a function that "
        f"gives pairs; got {type(weights).__name__}"
    )


def _mapped(path: Path) -> list[tuple[str, Tensor]]:
    """The tensors of a file, mapped into memory: numbers are read when they are used."""
    try:
        with safe_open(path, framework="pt") as file:
            return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _files(path: Path) -> list[Path]:
    index = path / _INDEX
    try:
        if path.is_file():
            return [path]
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"].values()
            return [path / name for name in dict.fromkeys(names)]
        files = sorted(path.glob("*.safetensors"))
    except OSError as error:
        raise CheckpointError(f"{path!s:.300} cannot be read: {error!s:.300}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error}") from error
    if not files:
        raise CheckpointError(f"{path} holds no safetensors file")
    return files
