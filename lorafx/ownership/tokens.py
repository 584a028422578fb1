"""The token position of each row of a site, for slots per token (B, T).

Ownership gives the request of a row. Here each dimension of a tensor has a state:

    rows (an expression)   index i stands for position (i // rows) mod T
    None                   neutral: the dimension says nothing about positions
    LOST                   positions were moved, contracted into it, or never known

Row t of attention's output stands for position t: states follow positions, not information.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeAlias

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership import contractions, indexing, pieces, pointwise, reductions, views
from lorafx.ownership import site_rules as sites
from lorafx.ownership.flow import Flow, outputs, wrap, wrap_all
from lorafx.ownership.labels import Label, Own
from lorafx.ownership.symbolic import (
    ONE,
    BatchSymbols,
    Shape,
    equal,
    is_multiple,
    product,
    reshaped,
)
from lorafx.torch_internals.graph_parts import OpOverload

aten = torch.ops.aten


class TokenState(Enum):
    """The state of a dimension whose positions are unknown."""

    LOST = "lost"


LOST = TokenState.LOST
State: TypeAlias = sympy.Basic | TokenState | None
States: TypeAlias = tuple[State, ...]


class Alignment:
    """States of all tensors of a graph, after ownership propagation (`flow`)."""

    def __init__(
        self, graph: fx.Graph, flow: Flow, tokens: BatchSymbols, seeds: Mapping[fx.Node, int]
    ) -> None:
        self.flow = flow
        self._same = dict.fromkeys(tokens.members, tokens.canonical)
        self.tokens = tokens.canonical
        self.states: dict[fx.Node, States] = {}
        for node in graph.nodes:
            if isinstance(outputs(node)[0], torch.Tensor):
                self.states[node] = (
                    self._input(node, seeds) if node.op == "placeholder" else (self._state(node))
                )

    def shape(self, node: object) -> Shape:
        return tuple(size.xreplace(self._same) for size in self.flow.shape(node))

    def of(self, arg: object) -> States:
        """A tensor's states; all neutral if it depends on no request."""
        if isinstance(arg, fx.Node) and self.flow.label(arg) is not None and arg in self.states:
            return self.states[arg]
        return (None,) * len(self.shape(arg))

    def rows_in_order(self, node: fx.Node, label: Label, ndim: int) -> sympy.Expr | None:
        """R with row m of the first `ndim` dimensions ↔ slot (m // R) mod (B·T) of the (B, T) slots
        in row-major order, or None."""
        shape = self.shape(node)[:ndim]
        if not isinstance(label, Own) or label.perm is not None or label.dim >= ndim:
            return None
        request = label.rows.xreplace(self._same) * product(shape[label.dim + 1 :])
        for dim, state in enumerate(self.of(node)[:ndim]):
            if state is not None and state is not LOST:
                position = state * product(shape[dim + 1 :])
                if equal(request, position * self.tokens):
                    return position
        return None

    def _input(self, node: fx.Node, seeds: Mapping[fx.Node, int]) -> States:
        label, at, shape = self.flow.label(node), seeds.get(node), self.shape(node)
        if label is None:
            return (None,) * len(shape)
        if at is not None and shape[at] == self.tokens:
            return tuple(ONE if d == at else None for d in range(len(shape)))
        owner = label.dim if isinstance(label, Own) else None
        return tuple(None if d == owner else LOST for d in range(len(shape)))

    def _state(self, node: fx.Node) -> States:
        n = outputs(node)[0].dim()  # type: ignore[union-attr]
        if node.target is operator.getitem:
            states = self.states[operand(node)]
            return states if len(states) == n else (LOST,) * n
        if not isinstance(node.target, OpOverload):
            return (LOST,) * n
        packet = node.target.overloadpacket
        if packet in views.MOVES:
            states = self._moved(node, views.MOVES[packet][0])
        elif packet in views.VIEWS:
            states = self._viewed(node)
        elif packet in contractions.PRODUCTS:
            states = self._contracted(node, packet)
        elif packet == aten.slice:
            states = self._sliced(node)
        elif pieces.RULES.get(packet) is pieces.split:
            states = self._split(node)
        elif packet == aten.cat:
            states = self._joined(node)
        elif contractions.RULES.get(packet) is contractions.attention:
            states = (*self.of(bound(node)["query"])[:-1], None)
        elif reductions.RULES.get(packet) is reductions.reduced:
            states = self._reduced(node)
        elif (
            packet in (aten._softmax, aten.softmax, aten._safe_softmax, aten.cumsum)
            or indexing.RULES.get(packet) in (indexing.fixed, indexing.gathered)
            or (packet == aten.index_put and self.flow.label(bound(node)["values"]) is None)
        ):
            states = self.of(operand(node))
        elif packet == aten.embedding:
            states = (*self.of(bound(node)["indices"]), None)
        elif sites.RULES.get(packet) is sites.rows_of:
            states = self.of(bound(node)["y"])
            if LOST in states[:-1]:
                states = (*self.of(sites.input_of(node))[: n - 1], None)
        elif packet in sites.RULES:
            states = self.of(bound(node)["y"])
        elif (
            pointwise.RULES.get(packet) is pointwise.pointwise
            or torch.Tag.pointwise in node.target.tags
        ):
            states = self._broadcast(node.all_input_nodes, n)
        elif pointwise.RULES.get(packet) is pointwise.copied:
            states = self._broadcast([bound(node)["src"]], n)
        elif packet in reductions.SPATIAL:
            states = self.of(operand(node))[:1] + (LOST,) * (n - 1)
        else:
            states = (LOST,) * n
        return tuple(states) if len(states) == n else (LOST,) * n

    def _broadcast(self, args: Sequence[object], n: int) -> States:
        """Operands that are not broadcast along a dimension must agree there."""
        states: list[State] = [None] * n
        for arg in args:
            shape, operand_states = self.shape(arg), self.of(arg)
            for d, state in enumerate(operand_states, n - len(operand_states)):
                if shape[d - n] != ONE:
                    states[d] = self._common(states[d], state)
        return tuple(states)

    @staticmethod
    def _common(a: State, b: State) -> State:
        if a is None or b is None:
            return b if a is None else a
        return a if a == b else LOST

    def _moved(self, node: fx.Node, renumber: views.Renumber) -> States:
        """Permutations keep states; rolls and pads lose them."""
        n, kept = len(self.shape(node)), self.of(operand(node))
        states: list[State] = [None] * n
        for d, state in enumerate(kept):
            if state is None or self.shape(operand(node))[d] == ONE:
                continue
            to = renumber(node, self.flow, d)
            if to is not None:
                states[to] = state
            elif len(kept) == n:
                states[d] = LOST
        return tuple(states)

    def _viewed(self, node: fx.Node) -> States:
        old, new = self.shape(operand(node)), self.shape(node)
        states: list[State] = [None] * len(new)
        for d, state in enumerate(self.of(operand(node))):
            if state is None or old[d] == ONE:
                continue
            lost = state is LOST
            rows = ONE if lost else state
            to = reshaped(d, rows, self.tokens, old, new, fixed=lost)
            if to is None:
                return (LOST,) * len(new)
            states[to[0]] = LOST if lost else self._common(states[to[0]], to[1])
        return tuple(states)

    def _contracted(self, node: fx.Node, packet: object) -> States:
        args = bound(node)
        addend, *operands = contractions.PRODUCTS[packet]
        left, right = (args[name] for name in operands)
        a, b = list(self.of(left)), list(self.of(right))
        # T entries that a weight makes of positions are no list of positions.
        for weight, states, dim, contracted in ((left, a, -2, b[-2]), (right, b, -1, a[-1])):
            made = contracted is not None and self.flow.label(weight) is None
            if made and is_multiple(self.shape(weight)[dim], self.tokens):
                states[dim] = LOST
        out = (*(self._common(x, y) for x, y in zip(a[:-2], b[:-2], strict=True)), a[-2], b[-1])
        if not addend:
            return out
        bias = self._broadcast([args[addend]], len(out))
        return tuple(self._common(x, y) for x, y in zip(out, bias, strict=True))

    def _sliced(self, node: fx.Node) -> States:
        args, states = bound(node), list(self.of(operand(node)))
        dim = wrap(args["dim"], len(states))
        if states[dim] is not None and not pieces.is_full(node, self.flow, dim, args["step"]):
            states[dim] = LOST
        return tuple(states)

    def _split(self, node: fx.Node) -> States:
        states = list(self.of(operand(node)))
        dim = wrap(bound(node).get("dim", 0), len(states))
        states[dim] = None if states[dim] is None else LOST
        return tuple(states)

    def _joined(self, node: fx.Node) -> States:
        args, n = bound(node), len(self.shape(node))
        states = list(self._broadcast(args["tensors"], n))
        states[wrap(args["dim"], n)] = (
            LOST
            if any(
                self.flow.label(t) is not None and self.of(t)[wrap(args["dim"], n)] is not None
                for t in args["tensors"]
            )
            else None
        )
        return tuple(states)

    def _reduced(self, node: fx.Node) -> States:
        args, states = bound(node), list(self.of(operand(node)))
        dims = wrap_all(args.get("dim", args.get("dims")), len(states))
        if args.get("keepdim", args.get("keepdims", False)):
            return tuple(None if d in dims else s for d, s in enumerate(states))
        return tuple(s for d, s in enumerate(states) if d not in dims)
