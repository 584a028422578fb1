"""Reuse of executables: a new graph may equal a compiled one for certain values of its symbols.

    compiled    f(ids [s0, s1], mask [s0, s1])     of several requests
    captured    g(ids [1, s2], mask [1, s2])       of one: a size of one is a constant to Dynamo
    instance    g = f with s0 = 1, s1 = s2:        f's executable serves g

Targets, literals, operands and result sizes must be equal after substitution. The assumptions that
the compiler made about symbols must hold for the new sizes too, and become guards.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from lorafx.capture.executable import InputSelection, Parts
from lorafx.capture.record import GraphRecord
from lorafx.model.module_graph import storage_key
from lorafx.torch_internals.dynamo import GlobalStateGuard
from lorafx.torch_internals.frames import captured_code, source_name, symbols_of_frame
from lorafx.torch_internals.graph_parts import OperatorBase, ShapeEnv, _dispatch_keys, tree_leaves

_SIZES = (int, torch.SymInt)
_LITERALS = (bool, float, complex, str, bytes)
#: Compiled graphs treat parameters as tensors, and `torch.func.functional_call` passes either.
_AS_INPUTS: Mapping[type, type] = {torch.nn.Parameter: Tensor}
_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, OperatorBase)


class _NoForm(Exception):
    """The graph contains a value that cannot be compared."""


class _Input(NamedTuple):
    """An input: its source, facts that hold for all sizes (None for an input that is a size), its
    sizes (or the size) and strides."""

    source: str
    facts: Hashable
    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...] = ()


@dataclass(frozen=True)
class Form:
    """The computation of a Dynamo graph with sizes as expressions, the `code` of the captured
    function, and what else the executable depends on (`context`)."""

    inputs: tuple[_Input, ...]
    nodes: tuple[Hashable, ...]
    code: CodeType
    context: Hashable

    @classmethod
    def of(cls, graph: fx.Graph, examples: Sequence[Any], context: Hashable) -> Form | None:
        """The form of the graph that is being captured; None if it cannot be compared."""
        numbers: dict[fx.Node, int] = {}
        nodes: list[Hashable] = []
        try:
            inputs = tuple(map(_input_form, graph.find_nodes(op="placeholder"), examples))
            for node in graph.nodes:
                if _computes_sizes(node):
                    continue
                if node.op != "placeholder":
                    nodes.append(_node_form(node, numbers))
                numbers[node] = len(numbers)
        except _NoForm:
            return None
        tensors = [item for item in examples if isinstance(item, Tensor)]
        first: dict[int, int] = {}
        shared = tuple(first.setdefault(storage_key(item), len(first)) for item in tensors)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return cls(inputs, tuple(nodes), captured_code(), (context, shared, modes))


def _input_form(node: fx.Node, example: Any) -> _Input:
    value = node.meta.get("example_value")
    source = source_name(node)
    if isinstance(value, _SIZES):
        return _Input(source, None, (_expression(value),))
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise _NoForm
    offset = _expression(value.storage_offset())
    if not offset.is_Integer:
        raise _NoForm
    gradients = value.requires_grad and torch.is_grad_enabled()
    cls, keys = type(example), _dispatch_keys(example).raw_repr()
    kind = _AS_INPUTS.get(cls, cls), value.dtype, value.device, gradients, keys
    flags = value.is_conj(), value.is_neg(), offset
    sizes, strides = (tuple(map(_expression, item)) for item in (value.shape, value.stride()))
    return _Input(source, (kind, flags), sizes, strides)


def _computes_sizes(node: fx.Node) -> bool:
    leaves = [] if node.op == "output" else tree_leaves(node.meta.get("example_value"))
    return bool(leaves) and all(isinstance(leaf, _SIZES) for leaf in leaves)


def _node_form(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Hashable:
    if node.op not in ("call_function", "call_method", "output"):
        raise _NoForm

    def argument(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            if value in numbers:
                return ("node", numbers[value])
            return argument(value.meta["example_value"])
        if isinstance(value, Mapping):
            return ("mapping", tuple((key, argument(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return ("slice", *map(argument, (value.start, value.stop, value.step)))
        if isinstance(value, (list, tuple)):
            return (isinstance(value, tuple), tuple(map(argument, value)))
        if isinstance(value, _SIZES) and not isinstance(value, bool):
            return _expression(value)
        if isinstance(value, _LITERALS):  # 1.0 and True are equal in Python
            return (type(value), repr(value))
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return ("plain", value)
        raise _NoForm

    result = None if node.op == "output" else node.meta.get("example_value")
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    sizes = tuple(tuple(map(_expression, item.shape)) for item in tensors)
    return (node.op, node.target, argument(node.args), argument(node.kwargs), sizes)


def _expression(value: int | torch.SymInt) -> sympy.Expr:
    return sympy.Integer(value) if isinstance(value, int) else value.node.expr


class _Values:
    """The values of an earlier graph's symbols for which its inputs have the form of new ones."""

    def __init__(self) -> None:
        self._known: dict[sympy.Expr, sympy.Expr] = {}
        self.of = functools.cache(lambda expr: expr.xreplace(self._known))

    @classmethod
    def between(cls, earlier: Sequence[_Input], now: Sequence[_Input]) -> _Values | None:
        values, by_source = cls(), {item.source: item for item in now}
        tensors = [[item.source for item in inputs if item.facts] for inputs in (earlier, now)]
        if tensors[0] != tensors[1]:
            return None
        pairs = [(item, by_source[item.source]) for item in earlier if item.source in by_source]
        for before, item in pairs:
            if before.facts != item.facts or not values._bind(before.sizes, item.sizes):
                return None
        if not all(values.known(size) for before in earlier for size in before.sizes):
            return None
        for before, item in pairs:
            strides = zip(before.strides, item.strides, item.sizes, strict=bool(item.facts))
            if not values.equal(before.sizes, item.sizes) or any(
                values.of(old) != new for old, new, size in strides if size != 1
            ):
                return None
        return values

    def _bind(self, symbols: Sequence[sympy.Expr], values: Sequence[sympy.Expr]) -> bool:
        """Bind unbound symbols to values; other expressions are compared later."""
        return len(symbols) == len(values) and all(
            not symbol.is_Symbol or self._known.setdefault(symbol, value) == value
            for symbol, value in zip(symbols, values, strict=True)
        )

    def known(self, expr: Any) -> bool:
        return bool(expr.free_symbols <= self._known.keys())

    def equal(self, earlier: Any, now: Any) -> bool:
        if isinstance(earlier, sympy.Expr):
            return isinstance(now, sympy.Expr) and bool(self.of(earlier) == now)
        if isinstance(earlier, tuple):
            same_length = isinstance(now, tuple) and len(earlier) == len(now)
            return same_length and all(map(self.equal, earlier, now))
        return bool(earlier == now)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled graph with its record and parts, its `assumptions` about symbols, and torch's
    global state at capture."""

    record: GraphRecord
    parts: Parts
    form: Form
    executable: Callable[..., Any]
    assumptions: tuple[Any, ...]
    state: Any

    def selection(self, form: Form, environment: ShapeEnv) -> InputSelection | None:
        """How it serves a graph of this form; None if it cannot."""
        earlier = self.form
        if earlier.code is not form.code or earlier.context != form.context:
            return None
        values = _Values.between(earlier.inputs, form.inputs)
        if values is None or not values.equal(earlier.nodes, form.nodes):
            return None
        places = self._input_places(form.inputs, values)
        known = all(map(values.known, self.assumptions))
        if len(places) < 2 or not self.state.check() or not known:
            return None
        if not _guard_assumptions([*map(values.of, self.assumptions)], environment):
            return None
        fixed_sizes = [place for place in places if isinstance(place, sympy.Integer)]
        behind = itertools.count(len(form.inputs))
        positions = tuple(p if isinstance(p, int) else next(behind) for p in places)
        return InputSelection(positions, tuple(map(int, fixed_sizes)))

    def _input_places(self, inputs: Sequence[_Input], values: _Values) -> list[Any]:
        """For each input of the executable its position in `inputs`, or a constant size; empty if
        one is missing."""
        index = {item.source if item.facts else item.sizes[0]: n for n, item in enumerate(inputs)}
        places: list[Any] = []
        for item in self.form.inputs:
            key = item.source if item.facts else values.of(item.sizes[0])
            constant = isinstance(key, sympy.Integer)
            if not constant and key not in index:
                return []
            places.append(key if constant else index[key])
        return places


def _guard_assumptions(assumptions: Sequence[Any], environment: ShapeEnv) -> bool:
    """Whether all assumptions hold for the frame's sizes; if so, they become its guards."""
    hints = environment.backed_var_to_val
    if any(expr.xreplace(hints) != sympy.true for expr in assumptions):
        return False
    return all(expr == sympy.true or environment.create_symboolnode(expr) for expr in assumptions)


class Instances:
    """The compiled graphs of a program that may serve new ones."""

    def __init__(self) -> None:
        self._compiled: list[Compiled] = []

    def find(self, form: Form) -> tuple[Compiled, InputSelection] | None:
        """A compiled graph for this form, and how it serves that."""
        environment = symbols_of_frame()
        if environment is None:
            return None
        for compiled in self._compiled:
            selection = compiled.selection(form, environment)
            if selection is not None:
                return compiled, selection
        return None

    def guard_count(self) -> int:
        environment = symbols_of_frame()
        return 0 if environment is None else len(environment.guards)

    def keep(
        self,
        record: GraphRecord,
        parts: Parts,
        form: Form,
        executable: Callable[..., Any],
        begin: int,
    ) -> None:
        environment = symbols_of_frame()
        symbols = any(size.free_symbols for item in form.inputs for size in item.sizes)
        if environment is None or not symbols:
            return
        assumptions = tuple(guard.expr for guard in environment.guards[begin:])
        state = GlobalStateGuard()
        self._compiled.append(Compiled(record, parts, form, executable, assumptions, state))
