"""Adds nodes to a graph: calls, sizes by their expressions, and slots of rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from lorafx.ownership.labels import Own
from lorafx.ownership.runs import Runs
from lorafx.ownership.symbolic import BatchSymbols, Sizes, as_expr
from lorafx.torch_internals import graph_parts
from lorafx.torch_internals.graph_parts import detect_fake_mode, enable_python_dispatcher

aten = torch.ops.aten


_FUNCTIONS: tuple[tuple[type, Callable[..., Any]], ...] = (
    (sympy.Mul, operator.mul),
    (sympy.Add, operator.add),
    (graph_parts.FloorDiv, operator.floordiv),
    (graph_parts.Mod, operator.mod),
    (graph_parts.PythonMod, operator.mod),
    (graph_parts.IntTrueDiv, operator.truediv),
    (graph_parts.CeilToInt, math.ceil),
    (graph_parts.FloorToInt, math.floor),
    (graph_parts.TruncToInt, math.trunc),
    (graph_parts.Max, torch.sym_max),
    (graph_parts.Min, torch.sym_min),
)


class Emitter:
    """Adds nodes to a graph, equal ones once; `before` must not move backwards between calls."""

    def __init__(self, graph: fx.Graph, batch: BatchSymbols) -> None:
        self.graph = graph
        self.sizes = Sizes(batch)
        self._sizes: dict[sympy.Expr, Any] = {}
        self._slots: dict[tuple[Any, ...], fx.Node] = {}
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.fake_mode = detect_fake_mode(
            [n.meta["val"] for n in self._inputs if isinstance(n.meta.get("val"), torch.Tensor)]
        )
        # Data-dependent sizes, which exist after the node that computes them.
        self._computed: dict[sympy.Expr, fx.Node] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                nodes = self._sizes if node.op == "placeholder" else self._computed
                nodes.setdefault(self.sizes.unify(value.node.expr), node)
                nodes.setdefault(value.node.expr, node)  # unified expressions may contain it

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
        """An int, or a node that computes `expr`; None if the graph cannot compute a symbol."""
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
            function = next((fn for kind, fn in _FUNCTIONS if isinstance(expr, kind)), None)
            if function is None:
                return None
            target, parts = function, list(expr.args)
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
            slot = self.call(before, aten.select.int, slots, 0, request)
            self._slots[key] = self.call(before, aten.unsqueeze.default, slot, 0)
        return self._slots[key]

    def row_slots(
        self, slots: fx.Node, label: Own, x: fx.Node, ndim: int, before: fx.Node
    ) -> fx.Node | None:
        """slots'[m] for each row of x, over its first `ndim` dimensions."""
        step = self.size(label.rows, before)
        if step is None:
            return None
        shape = tuple(self.sizes.shape(x.meta["val"])[:ndim])
        key = (slots, label, shape)
        if key not in self._slots:
            count = self.size_of(slots, 0, before)
            perm = self._positions(label.perm, slots, before)
            if perm is None:
                return None
            owner = self.call(before, aten.div.Scalar_mode, perm, step, rounding_mode="floor")
            owner = self.call(before, aten.remainder.Scalar, owner, count)
            entries = self.call(before, aten.index.Tensor, slots, [owner])
            self._slots[key] = self._by_row(entries, x, label.dim, ndim, before)
        return self._slots[key]

    def _positions(self, perm: Any, slots: fx.Node, before: fx.Node) -> fx.Node | None:
        """The vector of positions; None if the graph cannot compute their ends."""
        if not isinstance(perm, Runs):
            return perm
        parts: list[fx.Node] = []
        kind = {"dtype": torch.int64, "device": slots.meta["val"].device}
        for run in perm.runs:
            ends = (run.start, run.at(run.size), run.step)
            start, end, step = (self.size(sympy.sympify(end), before) for end in ends)
            size = self.size(run.size, before)
            if start is None or end is None or step is None or size is None:
                return None
            if run.step == 0:
                parts.append(self.call(before, aten.full.default, [size], start, **kind))
            else:
                call = self.call
                parts.append(call(before, aten.arange.start_step, start, end, step, **kind))
        return parts[0] if len(parts) == 1 else self.call(before, aten.cat.default, parts)

    def size_of(self, node: fx.Node, dim: int, before: fx.Node) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(before, aten.sym_size.int, node, dim)

    def _by_row(self, items: fx.Node, x: fx.Node, dim: int, ndim: int, before: fx.Node) -> fx.Node:
        """An entry for each row of x, from `items` (N,) along dimension `dim` of x."""
        if ndim == 1:
            return items
        shape = [self.size_of(x, d, before) for d in range(ndim)]
        sizes = [1] * dim + [shape[dim]] + [1] * (ndim - 1 - dim)
        rows = self.call(before, aten.view.default, items, sizes)
        rows = self.call(before, aten.expand.default, rows, shape)
        rows = self.call(before, aten.clone.default, rows, memory_format=torch.contiguous_format)
        return self.call(before, aten.view.default, rows, [-1])
