"""Row maps as graph nodes: sizes from the graph's symbols, slots through a permutation.

A map through a permutation p of N rows becomes a slot for each row, with n = len(slots):

    slots'[m] = slots[(p[i_m] // R) mod n]        (i_m row m's index along the owner dimension)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from lorafx.ownership.labels import Own
from lorafx.ownership.symbolic import BatchSymbols, Sizes, as_expr
from lorafx.torch_internals import symbols
from lorafx.torch_internals.fake_tensors import detect_fake_mode, enable_python_dispatcher

aten = torch.ops.aten

_FUNCTIONS: tuple[tuple[type, Callable[..., Any]], ...] = (
    (sympy.Mul, operator.mul),
    (sympy.Add, operator.add),
    (symbols.FloorDiv, operator.floordiv),
    (symbols.Mod, operator.mod),
    (symbols.PythonMod, operator.mod),
    (symbols.IntTrueDiv, operator.truediv),
    (symbols.CeilToInt, math.ceil),
    (symbols.FloorToInt, math.floor),
    (symbols.TruncToInt, math.trunc),
    (symbols.Max, torch.sym_max),
    (symbols.Min, torch.sym_min),
)


class Emitter:
    """Adds nodes to a graph, each value once. Request uses in graph order."""

    def __init__(self, graph: fx.Graph, batch: BatchSymbols) -> None:
        self.graph = graph
        self.sizes = Sizes(batch)
        self._sizes: dict[sympy.Expr, Any] = {}
        self._slots: dict[tuple[Any, ...], fx.Node] = {}
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.fake_mode = detect_fake_mode(
            [n.meta["val"] for n in self._inputs if isinstance(n.meta.get("val"), torch.Tensor)]
        )
        # Data-dependent sizes, available behind the node that computes them.
        self._computed: dict[sympy.Expr, fx.Node] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                known = self._sizes if node.op == "placeholder" else self._computed
                known.setdefault(self.sizes.unify(value.node.expr), node)
                known.setdefault(value.node.expr, node)  # also inside unified expressions

    def call(
        self, before: fx.Node, target: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if self.fake_mode is None:
            node.meta["val"] = target(*values[0], **values[1])
        else:
            # C++ kernels may specialise on the current value of a size.
            with enable_python_dispatcher(), self.fake_mode:
                node.meta["val"] = target(*values[0], **values[1])
        return node

    def size(self, expr: sympy.Expr, before: fx.Node) -> Any:
        """An int, or a node that computes `expr`; None where a symbol has no source here."""
        if expr.is_Integer:
            return int(expr)
        if expr in self._sizes:
            return self._sizes[expr]
        node = self._symbol(expr, before) if expr.is_Symbol else self._compound(expr, before)
        if node is not None:
            self._sizes[expr] = node
        return node

    def _symbol(self, symbol: sympy.Expr, before: fx.Node) -> Any:
        for source in self._inputs:
            value = source.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            for dim, size in enumerate(value.shape):
                if self.sizes.unify(as_expr(size)) == symbol:
                    return self.call(before, aten.sym_size.int, source, dim)
        return self._computed.get(symbol)

    def _compound(self, expr: sympy.Expr, before: fx.Node) -> Any:
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            target, parts = operator.mul, [expr.base] * int(expr.exp)
        else:
            found = next((fn for kind, fn in _FUNCTIONS if isinstance(expr, kind)), None)
            if found is None:
                return None
            target, parts = found, list(expr.args)
        total = None
        for part in parts:
            value = self.size(part, before)
            if value is None:
                return None
            if total is None:
                total = value
            elif isinstance(total, int) and isinstance(value, int):
                total = target(total, value)
            else:
                total = self.call(before, target, total, value)
        return total if len(parts) > 1 else self.call(before, target, total)

    def slot_of(self, slots: fx.Node, request: int, before: fx.Node) -> fx.Node:
        key = (slots, request)
        if key not in self._slots:
            one = self.call(before, aten.select.int, slots, 0, request)
            self._slots[key] = self.call(before, aten.unsqueeze.default, one, 0)
        return self._slots[key]

    def row_slots(
        self, slots: fx.Node, own: Own, x: fx.Node, ndim: int, before: fx.Node
    ) -> fx.Node | None:
        """slots'[m] for each row of x, over its first `ndim` dimensions."""
        step = self.size(own.rows, before)
        if step is None:
            return None
        shape = tuple(self.sizes.shape(x.meta["val"])[:ndim])
        key = (slots, own, shape)
        if key not in self._slots:
            count = self.size_of(slots, 0, before)
            owner = self.call(before, aten.div.Scalar_mode, own.perm, step, rounding_mode="floor")
            owner = self.call(before, aten.remainder.Scalar, owner, count)
            picked = self.call(before, aten.index.Tensor, slots, [owner])
            self._slots[key] = self._spread(picked, x, own.dim, ndim, before)
        return self._slots[key]

    def size_of(self, node: fx.Node, dim: int, before: fx.Node) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(before, aten.sym_size.int, node, dim)

    def _spread(self, picked: fx.Node, x: fx.Node, dim: int, ndim: int, before: fx.Node) -> fx.Node:
        """`picked` (N,), along dimension `dim` of x, as an entry for each row."""
        if ndim == 1:
            return picked
        shape = [self.size_of(x, d, before) for d in range(ndim)]
        line = [1] * dim + [shape[dim]] + [1] * (ndim - 1 - dim)
        wide = self.call(before, aten.view.default, picked, line)
        wide = self.call(before, aten.expand.default, wide, shape)
        wide = self.call(before, aten.clone.default, wide, memory_format=torch.contiguous_format)
        return self.call(before, aten.view.default, wide, [-1])
