"""Fake results of the calls that passes add, computed once for operands that are alike.

The layers of a model are given the same nodes one after another. With symbolic sizes an operator
takes milliseconds to say what it returns; a tensor laid out like an earlier result takes a tenth.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from lorafx.kernels.ops.stamp_op import Layout
from lorafx.model.module_graph import storage_key


class _Known(NamedTuple):
    """How a result is laid out, and where it is a view the place of the operand in whose memory it
    lies, and how far behind its first element."""

    layout: Layout
    place: int | None
    offset: int | torch.SymInt


class _Results(NamedTuple):
    """What a call returned: one tensor, or where `kind` is not None several of them in one."""

    kind: Callable[[list[FakeTensor]], Any] | None
    known: list[_Known]


class FakeResults:
    """What operators return, by their operands' layouts, in one capture."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Hashable, _Results] = {}

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `target` returns for these fake values and constants. Tensors are new ones."""
        if target is operator.getitem and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        key = _key((target, args, tuple(kwargs.items())))
        found = None if key is None else self._known.get(key)
        if found is None:
            with self._mode:
                value = target(*args, **kwargs)
            if key is not None:
                self._note(key, value, args)
            return value
        operands: list[Any] = []
        if any(known.place is not None for known in found.known):
            operands = _tensors(args)
        values = [
            layout.empty(self._mode) if place is None else layout.view_of(operands[place], offset)
            for layout, place, offset in found.known
        ]
        return values[0] if found.kind is None else found.kind(values)

    def _note(self, key: Hashable, value: Any, args: tuple[Any, ...]) -> None:
        several = isinstance(value, (list, tuple))
        values: Sequence[Any] = value if several else [value]
        if not all(map(_is_plain, values)):
            return
        operands = _tensors(args)
        memory = list(map(storage_key, operands))
        found: list[_Known] = []
        new: set[int] = set()
        for item in values:
            own = storage_key(item)
            if own in new or memory.count(own) > 1:
                return  # in one memory with another result, or in either of two operands'
            if own in memory:
                place = memory.index(own)
                offset = item.storage_offset() - operands[place].storage_offset()
                found.append(_Known(Layout.of(item), place, offset))
            else:
                new.add(own)
                found.append(_Known(Layout.of(item), None, 0))
        self._known[key] = _Results(value.__class__ if several else None, found)


def _tensors(args: tuple[Any, ...]) -> list[Any]:
    return [item for item in pytree.tree_leaves(args) if isinstance(item, Tensor)]


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, FakeTensor)
        and value.layout is torch.strided
        and not (value.is_conj() or value.is_neg() or value.requires_grad)
    )


def _key(value: Any) -> Hashable | None:
    """What a result depends on, or None where that is not known."""
    if isinstance(value, Tensor):
        if not _is_plain(value):
            return None
        numbers = (*value.shape, None, *value.stride(), value.storage_offset())
        return (tuple(map(_number, numbers)), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        items = tuple(map(_key, value))
        return None if None in items else (type(value), items)
    if isinstance(value, torch.SymInt):
        return ("size", _number(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value), value)
    if isinstance(value, (torch._ops.OpOverload, torch.dtype, torch.device)):
        return value
    return None


def _number(number: Any) -> Hashable:
    if isinstance(number, torch.SymInt):
        expression: Hashable = number.node.expr
        return expression
    return number  # an int, or the None between two lists
