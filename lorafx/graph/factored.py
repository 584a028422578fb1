"""The arithmetic of one LoRA adapter in an ATen graph, as PEFT writes it.

    y + ((x Aᵀ) Bᵀ + b) · scale        A (r, K) and B (N, r) graph inputs, y and the sum (..., N)

Each product may stand between views that keep the last dimension; y, x and the sum may have other
dtypes than the factors. That it is LoRA is decided by arithmetic alone: the rewrite is an equality
for whatever tensors A, B and y are, so no name or class has to be trusted for the result to be
right. Matching is pure: nothing in the graph is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.graph.weight_uses import RESHAPES, same_size
from lorafx.program.frame import arguments_of, fake_value

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
#: The dtypes that hold every value of a dtype.
WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


@dataclass(frozen=True)
class FactorTerm:
    """((x Aᵀ) Bᵀ + b) · scale.

    Attributes:
        x: (..., K), before views and before a cast that lost nothing.
        A, B: the nodes that hold the factors, (r, K) and (N, r).
        bias: (N,), the bias of B's linear, or None.
        scale: a number: PEFT's scaling, where Dynamo made it a constant that it guards.
        scales: nodes that hold one number each, 0-d: what Dynamo made of one that has changed.
    """

    x: fx.Node
    A: fx.Node
    B: fx.Node
    bias: fx.Node | None
    scale: float
    scales: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class FactorSum:
    """`node` = y + term, where `views` (outermost last) lead from y to the summand."""

    node: fx.Node
    y: fx.Node
    views: tuple[fx.Node, ...]
    term: FactorTerm


def factor_sum(node: fx.Node) -> FactorSum | None:
    """What `node` computes, where that is y + term; None where it is anything else."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    left, right = arguments_of(node)
    for base, delta in ((left, right), (right, left)):
        if not isinstance(base, fx.Node) or not isinstance(delta, fx.Node) or base is delta:
            continue
        term = _term(delta)
        if term is not None and _same_shape(base, node) and _same_shape(delta, node):
            y, views = _unviewed_result(base)
            return FactorSum(node, y, views, term)
    return None


def factor_chains(graph: fx.Graph) -> Iterator[fx.Node]:
    """The products (x Aᵀ) Bᵀ of two graph inputs, wherever their results go."""
    for node in graph.nodes:
        if _product_chain(node) is not None:
            yield node


def _term(delta: fx.Node) -> FactorTerm | None:
    scale = 1.0
    scales: list[fx.Node] = []
    node: Any = delta
    while isinstance(node, fx.Node) and len(node.users) == 1:
        found = _product_chain(node)
        if found is not None:
            x, A, B, bias = found
            return FactorTerm(x, A, B, bias, scale, tuple(scales))
        if _keeps_last_size(node) or _widens(node):
            node = arguments_of(node)[0]
        elif node.target is aten.mul.Tensor:
            node, factor = arguments_of(node)
            if _is_number(node):
                node, factor = factor, node
            if isinstance(factor, fx.Node):
                if not _is_number(factor):
                    return None
                scales.append(factor)
            else:
                scale *= factor
        else:
            return None
    return None


def _product_chain(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None] | None:
    """(x, A, B, bias) of a product (x Aᵀ) Bᵀ + b."""
    outer = _product(node)
    if outer is None:
        return None
    v, B, bias = outer
    while _keeps_last_size(v) and len(v.users) == 1:
        v = arguments_of(v)[0]
    inner = _product(v)
    if inner is None or inner[2] is not None or len(v.users) != 1:
        return None
    x, A, _ = inner
    if not same_size(fake_value(A).shape[0], fake_value(B).shape[1]):
        return None
    return _source(x), A, B, bias


def _product(node: Any) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(left, W, bias) of left Wᵀ + bias, where W is a graph input, cast or not."""
    if not isinstance(node, fx.Node):
        return None
    bias: Any = None
    if node.target is aten.mm.default:
        left, right = arguments_of(node)
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, left, right = arguments_of(node)
        if fake_value(bias).dim() != 1:
            return None
    else:
        return None
    weight = _transposed_input(right)
    return None if weight is None else (left, weight, bias)


def _transposed_input(node: fx.Node) -> fx.Node | None:
    """W where `node` is Wᵀ and W a graph input or the cast of one."""
    swapped = node.target is aten.t.default or (
        node.target is aten.permute.default and list(arguments_of(node)[1]) == [1, 0]
    )
    if not swapped:
        return None
    weight = origin = arguments_of(node)[0]
    while isinstance(origin, fx.Node) and origin.target is CAST:
        origin = arguments_of(origin)[0]
    return weight if isinstance(origin, fx.Node) and origin.op == "placeholder" else None


def _source(x: fx.Node) -> fx.Node:
    """x before views that keep its last dimension and casts that lost nothing."""
    while _keeps_last_size(x) or _widens(x):
        x = arguments_of(x)[0]
    return x


def _unviewed_result(y: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """y before views that keep its last dimension and that nothing else reads, and those views."""
    views: list[fx.Node] = []
    while _keeps_last_size(y) and len(y.users) == 1:
        views.insert(0, y)
        y = arguments_of(y)[0]
    return y, tuple(views)


def _keeps_last_size(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target not in RESHAPES:
        return False
    before, after = fake_value(arguments_of(node)[0]), fake_value(node)
    return before.dim() > 0 and after.dim() > 0 and same_size(before.shape[-1], after.shape[-1])


def _widens(node: Any) -> bool:
    """A cast to a dtype that holds every value of the one before."""
    if not isinstance(node, fx.Node) or node.target is not CAST:
        return False
    before, after = fake_value(arguments_of(node)[0]).dtype, fake_value(node).dtype
    return after in WIDER.get(before, ())


def _is_number(node: Any) -> bool:
    """A 0-d tensor of the graph."""
    value = fake_value(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    a, b = fake_value(one).shape, fake_value(other).shape
    return len(a) == len(b) and all(map(same_size, a, b))
