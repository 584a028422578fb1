"""Sizes as expressions, and comparisons of their symbols that are open, without sympy's thinking
about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from sympy.core import relational

#: What torch tells sympy of each symbol for a size.
_SIZE = {"integer": True, "positive": True}
_greater_than: Callable[[sympy.Symbol, Any], Any] = sympy.Symbol.__gt__
_equal: Callable[..., bool | None] = relational.is_eq


def size_expression(size: Any) -> Any:
    """The expression of a symbolic size, any other as it is. Comparing two adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def open_comparisons() -> Iterator[tuple[Any, str, Any]]:
    """What to set where, so that sympy does not look for what cannot be found."""
    yield sympy.Symbol, "__gt__", _greater
    yield relational, "is_eq", _is_eq


def _is_size(item: Any) -> bool:
    """Whether it is a symbol of which nothing is known but that it is a size."""
    return isinstance(item, sympy.Symbol) and getattr(item, "_assumptions_orig", None) == _SIZE


def _greater(symbol: sympy.Symbol, other: Any) -> Any:
    """`symbol > other`, without asking whether a size is greater than 1: that is open.

    torch writes that down of each new size for a solver that is off, and sympy thinks about it for
    0.3 ms: 2 % of the capture of 100 layers, each of which has eight sizes in its part of a cache.
    """
    if type(other) is int and other == 1 and _is_size(symbol):
        return sympy.StrictGreaterThan(symbol, other, evaluate=False)
    return _greater_than(symbol, other)


def _is_eq(lhs: Any, rhs: Any, assumptions: Any = None) -> bool | None:
    """Whether two are equal; None where that is open, as it is of a size and a positive number or
    another size. sympy takes 0.3 ms to find that: 2 % of the capture of 32 layers with a cache."""
    if assumptions is None and _is_size(lhs):
        if isinstance(rhs, sympy.Integer) and rhs.p > 0:
            return None
        if _is_size(rhs) and lhs != rhs:
            return None
    return _equal(lhs, rhs, assumptions)
