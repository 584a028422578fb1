"""Arguments and results of a call, cut into rows and put together again.

    argument   (…, B, …) in the dimension of its role → the rows of each wave
    result     the rows of each wave in dimension 0   → (B, …), in the order of the batch

Tensors may lie in lists, tuples, mappings and dataclasses, and those of results in transformers'
dynamic caches. What all requests share goes to every wave. Everything else is refused by name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorafx.errors import BatchError
from lorafx.program.roles import RoleTable
from lorafx.program.row_dims import CACHES, ROW_DIMS

#: What is no property of a row.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


class BatchRows:
    """The rows of one batch in waves. `row_dims` are those that the user declared."""

    def __init__(
        self, roles: RoleTable, row_dims: Mapping[str, int | None], waves: Sequence[Sequence[int]]
    ) -> None:
        self._roles, self._row_dims = roles, row_dims
        self.waves = [torch.tensor(list(wave)) for wave in waves]
        self.count = sum(map(len, waves))
        #: The arguments of the call, by name.
        self._named: Mapping[str, Any] = {}
        #: For each row of the batch, its place among the rows of all waves.
        self.places = torch.cat(self.waves).argsort()

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
        inside = self._inside(name, value) or ()
        return _rebuilt(value, [self.part(wave, label, item) for label, item in inside])

    def _inside(self, name: str, value: Any) -> list[tuple[str, Any]] | None:
        """What an argument holds, each item by the name that its role goes by."""
        items, spreads = _items(value), self._roles.spreads(name, value)
        if items is None:
            return None
        return [(f"{name}.{label}" if spreads else name, item) for label, item in items]

    def _check(self, name: str, value: Any) -> None:
        if isinstance(value, PLAIN):
            return
        if isinstance(value, Tensor):
            role = self._roles.role(name, value, self._named)
            shared = self._row_dims.get(name, 0) is None and value.dim()
            if not role.known or shared:
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
            return
        if isinstance(value, _cache_classes()):
            _refuse(
                f"argument {name!r} is a {type(value).__name__}, which all requests fill together"
            )
        inside = self._inside(name, value)
        if inside is None or any(isinstance(i, PLAIN) and i is not None for _, i in inside):
            _refuse(
                f"argument {name!r} ({type(value).__name__}) cannot be cut into the rows of "
                "its requests"
            )
        for label, item in inside:
            self._check(label, item)


class Joined:
    """The results of all waves as one. With `several` a result may have several entries of each
    request, as `generate` returns them; `padding` fills sequences that have ended."""

    def __init__(self, rows: BatchRows, *, several: bool, padding: int | None = None) -> None:
        self._rows, self._several, self._padding = rows, several, padding

    @torch.no_grad()
    def of(self, results: Sequence[Any]) -> Any:
        """The result of the batch; BatchError where a part of it cannot be put together."""
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
        items = [_items(part) or [] for part in parts]
        if _items(first) is None or len(set(map(len, items))) > 1:
            _refuse(
                f"{name} ({type(first).__name__}) cannot be put together from the rows' own, of "
                f"{', '.join(str(len(of_part)) for of_part in items)} entries"
            )
        columns = zip(*items, strict=True)
        return _rebuilt(
            first,
            [self._join(column[0][0] or name, [item for _, item in column]) for column in columns],
        )

    def _tensors(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        rows = self._rows
        if name == "beam_indices":
            _refuse("beam_indices are places in the batch, which are others in each wave")
        dim = ROW_DIMS[name] if name in CACHES else 0
        assert dim is not None
        times = self._times(name, parts, dim)
        if name in ("sequences", "the result") and self._several:
            parts = self._padded(parts)
        if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
            _refuse(f"{name} has shapes {_shapes(parts)} for the rows of the batch")
        whole = torch.cat(list(parts), dim)
        order = rows.places[:, None] * times + torch.arange(times)
        return whole.index_select(dim, order.flatten().to(whole.device))

    def _times(self, name: str, parts: Sequence[Tensor], dim: int) -> int:
        """How many entries of each request a result has."""
        sizes = [len(wave) for wave in self._rows.waves]
        counts = [part.shape[dim] if part.dim() > dim else 0 for part in parts]
        times = counts[0] // sizes[0]
        several = times > 1 and not self._several
        if times < 1 or several or counts != [size * times for size in sizes]:
            _refuse(
                f"{name} has shapes {_shapes(parts)} for {', '.join(map(str, sizes))} requests, and"
                f" dimension {dim} should hold them: what is of all rows together has no order to "
                "be put into"
            )
        return times

    def _padded(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        lengths = [part.shape[1] if part.dim() == 2 else 0 for part in parts]
        if len(set(lengths)) == 1 or self._padding is None:
            return parts
        return [
            nn.functional.pad(part, (0, max(lengths) - length), value=self._padding)
            for part, length in zip(parts, lengths, strict=True)
        ]

    def _cache(self, name: str, parts: Sequence[Any]) -> Any:
        """A cache of the rows of all `parts`, with layers of keys and values that grow."""
        made = copy.copy(parts[0])
        inner = [n for n, value in vars(made).items() if isinstance(value, _cache_classes())]
        for attribute in inner:  # of an encoder and a decoder
            caches = [getattr(part, attribute) for part in parts]
            setattr(made, attribute, self._cache(name, caches))
        if inner:
            return made
        dynamic = sys.modules["transformers.cache_utils"].DynamicLayer
        for layer in made.layers:
            if not isinstance(layer, dynamic) or getattr(made, "offloading", False):
                _refuse_cache(name, made, layer)
        columns = zip(*(part.layers for part in parts), strict=True)
        made.layers = [self._layer(name, made, layers) for layers in columns]
        return made

    def _layer(self, name: str, cache: Any, layers: Sequence[Any]) -> Any:
        made = copy.copy(layers[0])
        for attribute, value in list(vars(made).items()):
            values = [getattr(layer, attribute) for layer in layers]
            if isinstance(value, Tensor) and attribute in ("keys", "values"):
                if value.numel():
                    setattr(made, attribute, self._tensors(f"{attribute} of {name}", values))
            elif isinstance(value, PLAIN):
                if any(other != value for other in values):
                    _refuse(f"{attribute} of {name} ({type(made).__name__}) differs between rows")
            elif not isinstance(value, Tensor) or value.dim():
                _refuse_cache(name, cache, made)
        return made


def _refuse(why: str) -> NoReturn:
    raise BatchError(
        f"{why}. The batch has more adapters than slots. Split it, or compile with a larger "
        "LoraConfig(max_adapters=...)"
    )


def _refuse_cache(name: str, cache: Any, layer: Any) -> NoReturn:
    _refuse(
        f"{name} is a {type(cache).__name__} with layers {type(layer).__name__}, which "
        "cannot be cut into rows; give a DynamicCache, or use_cache=False"
    )


def _shapes(parts: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(part.shape)) for part in parts)


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, by name where its items have names; None where it is none."""
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    return [("", item) for item in value] if isinstance(value, (list, tuple)) else None


def _rebuilt(value: Any, items: Sequence[Any]) -> Any:
    """A container like `value` with these items."""
    kind: Any = type(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value))
        return replace(value, **dict(zip(names, items, strict=True)))
    if isinstance(value, Mapping):
        return kind(zip(value, items, strict=True))
    return kind(*items) if hasattr(value, "_fields") else kind(items)


def _cache_classes() -> tuple[type, ...]:
    """transformers' caches, where it is imported."""
    known = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return () if known is None else (known,)
