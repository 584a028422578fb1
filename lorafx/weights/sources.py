"""Sources of weights: anything that yields (name, tensor) pairs.

    kind                       read twice   a tensor stays as it was given
    mapping, list, tuple       yes          yes
    safetensors file, folder   yes          yes, read from disk again
    function of no arguments   yes          no: it may fill one buffer again and again
    any other iterable         no           no

A source that can be read twice is checked as a whole before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafx.errors import CheckpointError, ConfigError
from lorafx.interrupts import undisturbed
from lorafx.weights.weight_places import Numbers, WeightShape

NamedTensors = Iterable[tuple[str, Tensor]]
#: Arguments of `load_weights`.
Weights = Mapping[str, Tensor] | NamedTensors | Callable[[], NamedTensors] | str | os.PathLike[str]

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Item(NamedTuple):
    """A tensor that `read` gives while it stays valid; `given` itself, if it was not on disk."""

    name: str
    shape: WeightShape
    numbers: Numbers
    read: Callable[[], Tensor]
    given: Tensor | None = None


@dataclass(frozen=True)
class WeightSource:
    """A kind of source. `repeatable`: it can be read twice; `stable`: its tensors stay valid."""

    items: Callable[[], Iterator[Item]]
    repeatable: bool
    stable: bool


def source_of(weights: Weights) -> WeightSource:
    """The source of `weights`. CheckpointError for a path without safetensors."""
    if isinstance(weights, (str, os.PathLike)):
        return WeightSource(_stored(_files(Path(weights))), repeatable=True, stable=True)
    if isinstance(weights, Mapping):
        return WeightSource(lambda: _given(weights.items()), repeatable=True, stable=True)
    if isinstance(weights, Sequence):
        return WeightSource(lambda: _given(weights), repeatable=True, stable=True)
    if isinstance(weights, Iterable):
        return WeightSource(lambda: _given(weights), repeatable=False, stable=False)
    if callable(weights):
        return WeightSource(lambda: _given(weights()), repeatable=True, stable=False)
    raise ConfigError(
        "weights are (name, tensor) pairs, a mapping, a path of safetensors, or a function that "
        f"gives pairs; got {type(weights).__name__}"
    )


def _given(pairs: Iterable[Any]) -> Iterator[Item]:
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ConfigError(f"weights are (name, tensor) pairs, got {type(pair).__name__}")
        name, tensor = pair
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
        plain = tensor.detach()
        yield Item(name, tuple(plain.shape), Numbers.of(plain), plain.detach, plain)


def _stored(paths: Sequence[Path]) -> Callable[[], Iterator[Item]]:
    # Each is opened once: reading its header takes time.
    opened = cache(partial(safe_open, framework="pt"))

    def read(path: Path, name: str) -> Tensor:
        with _reading(path):
            # torch takes an interrupt in the middle for a value that has no shape.
            return undisturbed(lambda: opened(path).get_tensor(name))

    def items() -> Iterator[Item]:
        for path in paths:
            with _reading(path):
                file = opened(path)
                parts = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118
            for name, part in parts:
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} is of dtype {part.get_dtype()}")
                shape = tuple(part.get_shape())
                yield Item(name, shape, Numbers(dtype), partial(read, path, name))

    return items


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
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


def in_file(file: Path, like: Tensor) -> Tensor:
    """A contiguous host tensor in `file`, of the shape and dtype of `like`. Disk space is allocated
    at once: a page without it would end the process (SIGBUS). Raises OSError without it."""
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, like.numel() * like.element_size())
    numbers = torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype)
    return numbers.view(like.shape)
