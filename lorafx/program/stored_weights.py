"""Weights that a graph makes of integers: W = (q − zero) ⊙ scale.

    affine(node) → the inputs q, scale and zero behind a node, and how it is laid out

q, int8 (N, K), is followed through casts, views and transposes; zero is subtracted and scale
multiplied, each once. Both have an entry for each row, or for each row and group of K / G columns.
Nothing depends on the library that wrote the expression: a node with another form has no result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.program.frame import fake_value

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = frozenset({aten._to_copy.default, prims.convert_element_type.default})
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})


@dataclass(frozen=True)
class Affine:
    """A node with the numbers of (q − zero) ⊙ scale, its factors None where they are one or zero.
    `groups` is G if the node is (N, G, K / G), and 0 if it is (N, K), or (K, N) if `transposed`."""

    integers: fx.Node
    zero: fx.Node | None = None
    scale: fx.Node | None = None
    groups: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        N, K = fake_value(self.integers).shape
        return N, K

    def factor(self, node: Any) -> fx.Node | None:
        """The input behind `node`, whose entries are those of rows or groups of this one."""
        if not isinstance(node, fx.Node) or self.transposed:
            return None
        N, _ = self.shape
        wanted = (N, self.groups, 1) if self.groups else (N, 1)
        return table_of(node, wanted, (N, self.groups or 1))


def table_of(node: fx.Node, shape: tuple[int, ...], stored: tuple[int, int]) -> fx.Node | None:
    """The input (N, G) of the sizes `stored` that `node` of `shape` is a view or cast of."""
    if tuple(fake_value(node).shape) != shape:
        return None
    while node.target in CASTS or node.target in VIEWS:
        node = operand(node)
    value = fake_value(node)
    known = node.op == "placeholder" and isinstance(value, torch.Tensor)
    return node if known and tuple(value.shape) == stored and value.is_contiguous() else None


def affine(node: Any) -> Affine | None:
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        value = fake_value(node)
        known = isinstance(value, torch.Tensor) and value.dtype == torch.int8 and value.dim() == 2
        return Affine(node) if known and all(isinstance(n, int) for n in value.shape) else None
    handler = _HANDLERS.get(node.target)
    return None if handler is None else handler(node, bound(node))


def _cast(node: fx.Node, call: dict[str, Any]) -> Affine | None:
    return affine(operand(node)) if fake_value(node).is_floating_point() else None


def _view(node: fx.Node, call: dict[str, Any]) -> Affine | None:
    inner, sizes = affine(operand(node)), tuple(fake_value(node).shape)
    if inner is None or inner.transposed:
        return None
    N, K = inner.shape
    if sizes == (N, K):
        return replace(inner, groups=0)
    whole = not inner.groups and len(sizes) == 3 and sizes[0] == N and sizes[1] * sizes[2] == K
    return replace(inner, groups=sizes[1]) if whole else None


def _permute(node: fx.Node, call: dict[str, Any]) -> Affine | None:
    inner = affine(call["self"])
    if inner is None or inner.groups or [*call["dims"]] != [1, 0]:
        return None
    return replace(inner, transposed=not inner.transposed)


def _subtract(node: fx.Node, call: dict[str, Any]) -> Affine | None:
    inner = affine(call["self"])
    zero = inner.factor(call["other"]) if inner is not None else None
    if inner is None or zero is None or call["alpha"] != 1 or inner.zero or inner.scale:
        return None
    return replace(inner, zero=zero) if fake_value(node).is_floating_point() else None


def _multiply(node: fx.Node, call: dict[str, Any]) -> Affine | None:
    for first, second in (("self", "other"), ("other", "self")):
        inner = affine(call[first])
        scale = inner.factor(call[second]) if inner is not None else None
        if inner is not None and scale is not None and inner.scale is None:
            return replace(inner, scale=scale)
    return None


_HANDLERS: dict[Any, Callable[[fx.Node, dict[str, Any]], Affine | None]] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(VIEWS, _view),
    aten.permute.default: _permute,
    aten.sub.Tensor: _subtract,
    aten.mul.Tensor: _multiply,
}
