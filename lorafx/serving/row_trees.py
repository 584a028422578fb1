"""Arguments and results of a call, cut into rows and put together again.

    argument   (…, B, …) in the dimension of its role → the rows of each wave
    result     the rows of each wave in dimension 0   → (B, …), in the order of the batch

Tensors may lie in lists, tuples, mappings and dataclasses, and those of results in transformers'
dynamic caches. What all requests share goes to every wave as it is. Everything else is refused by
name: nothing tells which of its entries is whose.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorafx.errors import BatchError
from lorafx.program.roles import RoleTable
from lorafx.program.row_dims import CACHES, ROW_DIMS

#: What is no property of a row.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)

_WAY_OUT = (
    "The batch has more adapters than slots. Split it, or compile with a larger "
    "LoraConfig(max_adapters=...)"
)


class BatchRows:
    """The rows of one batch in waves.

    Args:
        roles: of the arguments of the call.
        row_dims: what the user declared of them.
        waves: the rows of each wave.
    """

    def __init__(
        self, roles: RoleTable, row_dims: Mapping[str, int | None], waves: Sequence[Sequence[int]]
    ) -> None:
        self._roles, self._row_dims = roles, row_dims
        self.waves = [torch.tensor(list(wave)) for wave in waves]
        self.count = sum(map(len, waves))
        #: The arguments of the call, by name.
        self._named: Mapping[str, Any] = {}
        order = torch.cat(self.waves)
        #: For each row of the batch, its place among the rows of all waves.
        self.places = torch.empty_like(order)
        self.places[order] = torch.arange(self.count)

    def check(self, named: Mapping[str, Any]) -> None:
        """Raise BatchError unless all arguments can be cut."""
        self._named = named
        self._roles.check_rows(named, self.count)
        for name, value in named.items():
            self._check(name, value)

    def part(self, wave: int, name: str, value: Any) -> Any:
        """The argument of one wave."""
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, Tensor):
            dim = self._roles.role(name, value, self._named).dim
            if dim is None or value.shape[dim] == 1 != self.count:
                return value
            with torch.no_grad():
                return value.index_select(dim, self.waves[wave].to(value.device))
        items = zip(self._inside(name, value), _items(value) or (), strict=False)
        return _rebuilt(value, [self.part(wave, own, item) for own, item in items])

    def _inside(self, name: str, value: Any) -> Iterable[str]:
        """What the items of an argument are called."""
        if self._roles.spreads(name, value):
            return (f"{name}.{key}" for key in value)
        return itertools.repeat(name)

    def _check(self, name: str, value: Any) -> None:
        if isinstance(value, PLAIN):
            return
        if isinstance(value, Tensor):
            declared = self._row_dims.get(name, 0)
            role = self._roles.role(name, value, self._named)
            if not role.known or (declared is None and value.dim()):
                what = "is declared to be shared" if role.known else "is in no table of roles"
                _refuse(
                    f"nothing tells which entries of argument {name!r} {tuple(value.shape)} "
                    f"belong to which request: it {what}. Declare the dimension of the requests "
                    f"with LoraConfig(row_dims={{{name!r}: dim}})"
                )
            if role.dim is not None and value.shape[role.dim] not in (1, self.count):
                _refuse(
                    f"dimension {role.dim} of argument {name!r} {tuple(value.shape)} does not "
                    f"hold the {self.count} requests"
                )
        elif isinstance(value, _cache_classes()):
            _refuse(
                f"argument {name!r} is a {type(value).__name__}, which all requests fill together"
            )
        else:
            items = _items(value)
            if items is None or any(isinstance(item, PLAIN) and item is not None for item in items):
                _refuse(
                    f"argument {name!r} ({type(value).__name__}) cannot be cut into the rows of "
                    "its requests"
                )
            for own, item in zip(self._inside(name, value), items, strict=False):
                self._check(own, item)


class Joined:
    """The results of all waves as one.

    Args:
        rows: of the batch.
        several: a result may have several entries of each request, one request after another, as
            `generate` returns them.
        padding: what fills sequences that have ended; None where nothing is known to.
    """

    def __init__(self, rows: BatchRows, *, several: bool, padding: int | None = None) -> None:
        self._rows, self._several, self._padding = rows, several, padding

    def of(self, results: Sequence[Any]) -> Any:
        """The result of the batch.

        Raises:
            BatchError: a part of the results cannot be put together.
        """
        with torch.no_grad():
            return self._join("the result", results)

    def _join(self, name: str, parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            return self._tensors(name, parts)
        if isinstance(first, _cache_classes()):
            return self._cache(name, parts)
        if isinstance(first, PLAIN):
            if any(part != first for part in parts):
                _refuse(f"{name} is {first!r} for some rows and something else for others")
            return first
        items = [_items(part) for part in parts]
        if any(own is None or len(own) != len(items[0] or ()) for own in items):
            sizes = [0 if own is None else len(own) for own in items]
            _refuse(
                f"{name} ({type(first).__name__}) cannot be put together from the rows' own, of "
                f"{', '.join(map(str, sizes))} entries"
            )
        names = _names(first, name)
        columns = zip(names, *(own or () for own in items), strict=True)
        return _rebuilt(first, [self._join(own, column) for own, *column in columns])

    def _tensors(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        rows = self._rows
        if name == "beam_indices":
            _refuse("beam_indices are places in the batch, which are others in each wave")
        dim = ROW_DIMS[name] if name in CACHES else 0
        assert dim is not None
        sizes = [len(wave) for wave in rows.waves]
        times = _times(name, parts, dim, sizes, self._several)
        if name in ("sequences", "the result") and self._several:
            parts = self._padded(parts)
        if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            _refuse(f"{name} has shapes {shapes} for the rows of the batch")
        whole = torch.cat(list(parts), dim)
        order = rows.places[:, None] * times + torch.arange(times)
        return whole.index_select(dim, order.flatten().to(whole.device))

    def _padded(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        lengths = [part.shape[1] if part.dim() == 2 else 0 for part in parts]
        if len(set(lengths)) == 1 or self._padding is None:
            return parts
        return [
            nn.functional.pad(part, (0, max(lengths) - length), value=self._padding)
            for part, length in zip(parts, lengths, strict=True)
        ]

    def _cache(self, name: str, parts: Sequence[Any]) -> Any:
        made = copy.copy(parts[0])
        inner = _parts(parts[0])
        if inner:
            for own in inner:
                setattr(made, own, self._cache(name, [getattr(part, own) for part in parts]))
            return made
        every = [_layers(name, part) for part in parts]
        if len(set(map(len, every))) > 1:
            _refuse(f"{name}: caches of the rows have different numbers of layers")
        made.layers = [self._layer(name, layers) for layers in zip(*every, strict=True)]
        return made

    def _layer(self, name: str, layers: Sequence[Any]) -> Any:
        made, states = copy.copy(layers[0]), [_states(name, layer) for layer in layers]
        for own, tensor in states[0].items():
            if tensor.numel():
                label = f"{own} of {name} ({type(layers[0]).__name__})"
                setattr(made, own, self._tensors(label, [state[own] for state in states]))
        for own, value in vars(made).items():
            if own in states[0] or isinstance(value, Tensor):
                continue
            if any(vars(layer)[own] != value for layer in layers):
                _refuse(f"{own} of {name} ({type(made).__name__}) differs between the rows")
        return made


def _times(
    name: str, parts: Sequence[Tensor], dim: int, sizes: Sequence[int], several: bool
) -> int:
    """How many entries of each request a result has."""
    have = [part.shape[dim] if part.dim() > dim else 0 for part in parts]
    times = have[0] // sizes[0]
    if times < 1 or (times > 1 and not several) or have != [size * times for size in sizes]:
        shapes = ", ".join(f"{tuple(part.shape)}" for part in parts)
        _refuse(
            f"{name} has shapes {shapes} for {', '.join(map(str, sizes))} requests, and dimension "
            f"{dim} should hold them: what is of all rows together has no order to be put into"
        )
    return times


def _refuse(why: str) -> NoReturn:
    raise BatchError(f"{why}. {_WAY_OUT}")


def _fields(value: Any) -> list[str] | None:
    """The fields of a dataclass; None where it is none."""
    is_one = is_dataclass(value) and not isinstance(value, type)
    return [field.name for field in fields(value)] if is_one else None


def _items(value: Any) -> list[Any] | None:
    """What a container holds; None where it is none."""
    names = _fields(value)
    if names is not None:
        return [getattr(value, name) for name in names]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else None


def _names(value: Any, name: str) -> Sequence[str]:
    """What messages call the items of a container."""
    names = _fields(value)
    if names is None:
        return list(map(str, value)) if isinstance(value, Mapping) else [name] * len(value)
    return names


def _rebuilt(value: Any, items: Sequence[Any]) -> Any:
    """A container like `value` with these items."""
    names, kind = _fields(value), type(value)
    if names is not None:
        return replace(value, **dict(zip(names, items, strict=True)))
    if isinstance(value, Mapping):
        return kind(zip(value, items, strict=True))
    return kind(*items) if hasattr(value, "_fields") else kind(items)


def _cache_classes() -> tuple[type, ...]:
    """transformers' caches, where it is imported."""
    known = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return () if known is None else (known,)


def _parts(cache: Any) -> dict[str, Any]:
    """The caches that a cache consists of."""
    return {
        name: value for name, value in vars(cache).items() if isinstance(value, _cache_classes())
    }


def _layers(name: str, cache: Any) -> list[Any]:
    """The layers of a cache, and of those that it consists of.

    Raises:
        BatchError: one of them is not dynamic: keys and values that grow.
    """
    parts = _parts(cache)
    if parts:
        return [layer for part in parts.values() for layer in _layers(name, part)]
    dynamic = sys.modules["transformers.cache_utils"].DynamicLayer
    layers: list[Any] = cache.layers
    for layer in layers:
        if not isinstance(layer, dynamic) or getattr(cache, "offloading", False):
            _refuse(
                f"{name} is a {type(cache).__name__} with layers {type(layer).__name__}, which "
                "cannot be cut into rows; give a DynamicCache, or use_cache=False"
            )
    return layers


def _states(name: str, layer: Any) -> dict[str, Tensor]:
    """The tensors of a layer of a cache that hold its rows.

    Raises:
        BatchError: it holds something besides keys, values and numbers.
    """
    found = {}
    for own, value in vars(layer).items():
        if own in ("keys", "values") and isinstance(value, Tensor):
            found[own] = value
        elif not isinstance(value, PLAIN) and not (isinstance(value, Tensor) and not value.dim()):
            _refuse(
                f"{name} holds a {type(layer).__name__} with {own}, which cannot be cut into rows; "
                "give a DynamicCache, or use_cache=False"
            )
    return found
