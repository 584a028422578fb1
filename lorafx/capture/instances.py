"""Reuse of executables: a new graph equals a compiled one after some symbols are set.

    compiled    f(ids [s0, s1], mask [s0, s1])     of several requests
    captured    g(ids [1, s2], mask [1, s2])       of one: Dynamo takes a size of one for a constant
    instance    g = f with s0 = 1, s1 = s2:        f's executable serves g

Targets, literals, operands and result sizes must be equal after substitution; the compiler's
assumptions about symbols must hold for these sizes too, and are guarded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lorafx.model.module_graph import storage_key
from lorafx.torch_internals.dynamo import GlobalStateGuard
from lorafx.torch_internals.frames import captured_code, source_name, symbols_of_frame
from lorafx.torch_internals.operators import OperatorBase, _dispatch_keys
from lorafx.torch_internals.symbols import ShapeEnv
from lorafx.torch_internals.trees import tree_leaves

_SIZES = (int, torch.SymInt)
_LITERALS = (bool, float, complex, str, bytes)
#: Compiled graphs treat parameters as tensors; `torch.func.functional_call` may give either.
_AS_INPUTS: Mapping[type, type] = {torch.nn.Parameter: Tensor}
_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, OperatorBase)


class _NoForm(Exception):
    """The graph contains a value that cannot be compared."""


@dataclass(frozen=True)
class _Size:
    """A number, a symbol, or an expression of symbols."""

    expr: sympy.Expr


@dataclass(frozen=True)
class _Input:
    """An input: its source, and facts that hold for all sizes. Size inputs have `size` alone."""

    source: str
    facts: Hashable
    sizes: tuple[sympy.Expr, ...] = ()
    strides: tuple[sympy.Expr, ...] = ()
    size: sympy.Expr | None = None


@dataclass(frozen=True)
class Form:
    """The computation of a Dynamo graph; `nodes` without sizes, `code` of the captured function,
    and the executable's other dependencies, `context`."""

    inputs: tuple[_Input, ...]
    nodes: tuple[Hashable, ...]
    code: CodeType
    context: Hashable

    @classmethod
    def of(cls, graph: fx.Graph, examples: Sequence[Any], context: Hashable) -> Form | None:
        """The form of the graph being captured, if comparable; `context` must be equal too."""
        numbers: dict[fx.Node, int] = {}
        inputs, nodes = [], []
        try:
            for node, example in zip(graph.find_nodes(op="placeholder"), examples, strict=True):
                inputs.append(_input(node, example))
                if inputs[-1].size is None:
                    numbers[node] = len(numbers)
            for node in graph.nodes:
                if node.op != "placeholder" and not _of_sizes(node):
                    nodes.append(_node(node, numbers))
                    numbers[node] = len(numbers)
        except _NoForm:
            return None
        strided = [item for item in examples if isinstance(item, Tensor)]
        first: dict[int, int] = {}
        shared = tuple(first.setdefault(storage_key(item), len(first)) for item in strided)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return cls(tuple(inputs), tuple(nodes), captured_code(), (context, shared, modes))


def _input(node: fx.Node, example: Any) -> _Input:
    value = node.meta.get("example_value")
    source = source_name(node)
    if isinstance(value, _SIZES):
        return _Input(source, "size", size=_expression(value))
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


def _of_sizes(node: fx.Node) -> bool:
    leaves = [] if node.op == "output" else tree_leaves(node.meta.get("example_value"))
    return bool(leaves) and all(isinstance(leaf, _SIZES) for leaf in leaves)


def _node(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Hashable:
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
            return _Size(_expression(value))
        if isinstance(value, _LITERALS):  # 1.0 and True are equal in Python
            return (type(value), repr(value))
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return ("plain", value)
        raise _NoForm

    made = None if node.op == "output" else node.meta.get("example_value")
    tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    sizes = tuple(tuple(_Size(_expression(size)) for size in item.shape) for item in tensors)
    return (node.op, node.target, argument(node.args), argument(node.kwargs), sizes)


def _expression(value: int | torch.SymInt) -> sympy.Expr:
    return sympy.Integer(value) if isinstance(value, int) else value.node.expr


class _Values:
    """The values of an earlier graph's symbols."""

    def __init__(self) -> None:
        self._known: dict[sympy.Expr, sympy.Expr] = {}
        self._found: dict[sympy.Expr, sympy.Expr] = {}

    def bind(self, symbol: sympy.Expr, value: sympy.Expr) -> bool:
        """Bind a symbol, if unbound; expressions are compared later."""
        return not symbol.is_Symbol or self._known.setdefault(symbol, value) == value

    def of(self, expr: Any) -> Any:
        if expr.is_Integer:
            return expr
        if expr not in self._found:
            self._found[expr] = expr.xreplace(self._known)
        return self._found[expr]

    def known(self, expr: Any) -> bool:
        return bool(expr.free_symbols <= self._known.keys())

    def equal(self, earlier: Any, now: Any) -> bool:
        if isinstance(earlier, _Size):
            return isinstance(now, _Size) and self.of(earlier.expr) == now.expr
        if isinstance(earlier, tuple):
            alike = isinstance(now, tuple) and len(earlier) == len(now)
            return alike and all(map(self.equal, earlier, now))
        return bool(earlier == now)


@dataclass(frozen=True, eq=False)
class _Compiled:
    """A compiled graph, the assumptions `found` about symbols, and torch's global state then."""

    title: str
    form: Form
    executable: Callable[..., Any]
    found: tuple[Any, ...]
    state: Any

    def instance(self, form: Form, environment: ShapeEnv) -> Callable[..., Any] | None:
        """The executable for a graph of this form, if more general."""
        earlier = self.form
        if earlier.code is not form.code or earlier.context != form.context:
            return None
        if len(earlier.nodes) != len(form.nodes):
            return None
        values = _matched(earlier.inputs, form.inputs)
        if values is None or not all(map(values.equal, earlier.nodes, form.nodes)):
            return None
        places = self._places(form.inputs, values)
        if places is None or not self.state.check() or not all(map(values.known, self.found)):
            return None
        if not _hold([*map(values.of, self.found)], environment):
            return None
        compiled, pick = self.executable, operator.itemgetter(*places[0])
        numbers = places[1]

        def run(*arguments: Any) -> Any:
            return compiled(*pick((*arguments, *numbers)))

        return run

    def _places(
        self, inputs: Sequence[_Input], values: _Values
    ) -> tuple[list[int], tuple[int, ...]] | None:
        """Positions of executable inputs among the given ones and the returned constant sizes."""
        at = {item.source: place for place, item in enumerate(inputs)}
        sized = {item.size: place for place, item in enumerate(inputs) if item.size is not None}
        places: list[int] = []
        numbers: list[int] = []
        for item in self.form.inputs:
            place = at.get(item.source)
            if item.size is not None:
                value = values.of(item.size)
                if value.is_Integer:
                    place = len(inputs) + len(numbers)
                    numbers.append(int(value))
                else:
                    place = sized.get(value)
            if place is None:
                return None
            places.append(place)
        return (places, tuple(numbers)) if len(places) > 1 else None


def _matched(earlier: Sequence[_Input], now: Sequence[_Input]) -> _Values | None:
    values = _Values()
    tensors = [[item for item in inputs if item.size is None] for inputs in (earlier, now)]
    if len(tensors[0]) != len(tensors[1]):
        return None
    pairs = list(zip(*tensors, strict=True))
    for before, item in pairs:
        same = before.source == item.source and before.facts == item.facts
        if not same or len(before.sizes) != len(item.sizes):
            return None
        if not all(map(values.bind, before.sizes, item.sizes)):
            return None
    given = {item.source: item.size for item in now if item.size is not None}
    sizes = [(item.size, given.get(item.source)) for item in earlier if item.size is not None]
    if not all(values.bind(size, value) for size, value in sizes if value is not None):
        return None
    for size, value in sizes:
        if not values.known(size) or value not in (None, values.of(size)):
            return None
    for before, item in pairs:
        if [*map(values.of, before.sizes)] != [*item.sizes]:
            return None
        strides = zip(before.strides, item.strides, item.sizes, strict=True)
        if any(values.of(old) != new for old, new, size in strides if size != 1):
            return None
    return values


def _hold(found: Sequence[Any], environment: ShapeEnv) -> bool:
    """Whether all assumptions hold now; they are then guarded."""
    hints = environment.backed_var_to_val
    if any(expr.xreplace(hints) != sympy.true for expr in found):
        return False
    return all(expr == sympy.true or environment.create_symboolnode(expr) for expr in found)


class Instances:
    """A program's graphs that may serve others."""

    def __init__(self) -> None:
        self._compiled: list[_Compiled] = []

    def find(self, form: Form) -> tuple[str, Callable[..., Any]] | None:
        """Title and executable of a compiled graph for this form."""
        environment = symbols_of_frame()
        if environment is None:
            return None
        for compiled in self._compiled:
            executable = compiled.instance(form, environment)
            if executable is not None:
                return compiled.title, executable
        return None

    def begin(self) -> int:
        environment = symbols_of_frame()
        return 0 if environment is None else len(environment.guards)

    def keep(self, title: str, form: Form, executable: Callable[..., Any], begun: int) -> None:
        environment = symbols_of_frame()
        symbols = any(size.free_symbols for item in form.inputs for size in item.sizes)
        if environment is None or not symbols:
            return
        found = tuple(guard.expr for guard in environment.guards[begun:])
        self._compiled.append(_Compiled(title, form, executable, found, GlobalStateGuard()))
