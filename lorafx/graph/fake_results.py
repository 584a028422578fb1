"""Fake results of the calls that passes add, computed once for operands that are alike.

The layers of a model are given the same nodes one after another. With symbolic sizes an operator
takes milliseconds to say what it returns; a tensor laid out like an earlier result takes a tenth.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from lorafx.kernels.ops.stamp_op import without_data
from lorafx.model.module_graph import storage_key


@dataclass(frozen=True)
class _Known:
    """A result, and where it is a view the operand in whose memory it lies, by its place."""

    value: FakeTensor
    base: FakeTensor | None
    place: int | None


class FakeResults:
    """What operators return, by their operands' layouts, in one capture."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Hashable, _Known] = {}

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `target` returns for these fake values and constants. Tensors are new ones."""
        key = _key((target, args, tuple(kwargs.items())))
        known = None if key is None else self._known.get(key)
        if known is None:
            with self._mode:
                value = target(*args, **kwargs)
            if key is not None:
                self._note(key, value, args)
            return value
        if known.place is None:
            return without_data(known.value)
        return without_data(known.value, known.base, _tensors(args)[known.place])

    def _note(self, key: Hashable, value: Any, args: tuple[Any, ...]) -> None:
        if not _is_plain(value):
            return
        operands = _tensors(args)
        shared = [
            place for place, item in enumerate(operands) if storage_key(item) == storage_key(value)
        ]
        if not shared:
            self._known[key] = _Known(value, None, None)
        elif len(shared) == 1:
            self._known[key] = _Known(value, operands[shared[0]], shared[0])


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
