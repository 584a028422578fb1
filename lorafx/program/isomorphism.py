"""Whether two stretches of a graph are the same computation on other operands.

    form(n_0 ... n_k) = for each node: what it calls, with what, and what comes out
                        for each operand: its metadata

An argument is the stretch's j-th node, the i-th distinct node from outside by first use, or a
literal with its type; symbols are numbered by first use, and must `agree` between stretches. Names
are ignored. Equal forms mean equal targets, literals, constants, shapes, strides, dtypes, devices
and aliasing. Mutation and randomness have no form: `regions_of` excludes them.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lorafx.program.frame import fake_value
from lorafx.torch_internals.compat import size_hint
from lorafx.torch_internals.graph_parts import FakeTensor, OperatorBase, unset_fake_temporarily

#: bytes of the widest vector load of Inductor's GPU kernels
VECTOR = 16
_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, OperatorBase)
_NUMBERS = (float, complex)
_DISCRETE = (int, str, bytes)


@dataclass(frozen=True)
class CanonicalForm:
    """Equal for stretches that compute the same on their operands."""

    nodes: tuple[Hashable, ...]
    operands: tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Adjacent nodes, their operands, the `symbols` of their sizes by number, and their form."""

    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    symbols: tuple[sympy.Symbol, ...]
    form: CanonicalForm


def stretch_of(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Stretch:
    """`nodes` of `gm`, in graph order, with their canonical form."""
    builder = _FormBuilder(gm, nodes)
    forms = tuple(builder.node(node) for node in nodes)
    operands = tuple(builder.operands)
    form = CanonicalForm(
        forms, tuple((builder.result(node), builder.aligned(node)) for node in operands)
    )
    return Stretch(tuple(nodes), operands, tuple(builder.symbols), form)


def agree(a: Stretch, b: Stretch, sizes: Mapping[sympy.Symbol, torch.SymInt]) -> bool:
    """Whether the symbols of two stretches of equal form are the same, or have equal sizes at
    capture, in which case guards are added. A symbol that is not in `sizes` equals only itself."""
    pairs = [(x, y) for x, y in zip(a.symbols, b.symbols, strict=True) if x != y]
    hints = {x: size_hint(sizes[x]) for pair in pairs for x in pair if x in sizes}
    known = all(hints.get(x) is not None and hints[x] == hints.get(y) for x, y in pairs)
    return known and all(bool(sizes[x] == sizes[y]) for x, y in pairs)


def sizes_of(graph: fx.Graph) -> dict[sympy.Symbol, torch.SymInt]:
    """Symbol -> size, for sizes among the graph's inputs and in their shapes."""
    sizes: dict[sympy.Symbol, torch.SymInt] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = fake_value(node)
            for size in (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    sizes.setdefault(size.node.expr, size)
    return sizes


class _FormBuilder:
    def __init__(self, gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
        self.gm = gm
        self.positions = {node: index for index, node in enumerate(nodes)}
        self.operands: dict[fx.Node, int] = {}
        self.symbols: dict[sympy.Symbol, int] = {}
        self.numbered: dict[sympy.Symbol, sympy.Symbol] = {}
        self.expressions: dict[sympy.Basic, sympy.Basic] = {}

    def node(self, node: fx.Node) -> Hashable:
        if node.op == "get_attr":
            return ("constant", _constant(operator.attrgetter(str(node.target))(self.gm)))
        arguments = (self.argument(node.args), self.argument(node.kwargs))
        return (node.op, node.target, *arguments, self.result(node))

    def argument(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            if value in self.positions:
                return ("node", self.positions[value])
            return ("operand", self.operands.setdefault(value, len(self.operands)))
        if value is None or isinstance(value, _DISCRETE):  # most literals
            return self.literal(value)
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return (kind, tuple(map(self.argument, value)))
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return ("slice", tuple(map(self.argument, parts)))
        if isinstance(value, Mapping):
            return ("mapping", tuple((key, self.argument(item)) for key, item in value.items()))
        return self.literal(value)

    def literal(self, value: Any) -> Hashable:
        """A literal with its type, floats as text: in Python 1 == 1.0 == True, and 0.0 == -0.0."""
        if isinstance(value, _DISCRETE):
            return (value.__class__, value)
        if value is None or isinstance(value, _PLAIN):
            return ("literal", value)
        if isinstance(value, _NUMBERS):
            return (value.__class__, repr(value))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ("symbol", self.expression(value.node.expr))
        return ("object", _Identity(value))

    def expression(self, expr: sympy.Basic) -> sympy.Basic:
        renamed = self.expressions.get(expr)
        if renamed is None:
            for symbol in sorted(expr.free_symbols, key=str):
                number = self.symbols.setdefault(symbol, len(self.symbols))
                self.numbered[symbol] = sympy.Dummy(
                    f"size{number}", dummy_index=number, integer=True, nonnegative=True
                )
            renamed = self.expressions[expr] = expr.xreplace(self.numbered)
        return renamed

    def result(self, node: fx.Node) -> Hashable:
        """The metadata of a node's result. A node without a fake value has a form of its own."""
        value = node.meta.get("val", node.meta.get("example_value", self))
        return ("unknown", _Identity(node)) if value is self else self.value(value)

    def aligned(self, operand: fx.Node) -> Hashable:
        """Whether vector loads of it are aligned, which Inductor checks in a body's first call."""
        value = fake_value(operand)
        if not isinstance(value, Tensor):
            return None
        offset = value.storage_offset()
        if isinstance(offset, int):
            return offset * value.dtype.itemsize % VECTOR == 0
        return self.literal(offset)

    def value(self, value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            if isinstance(value, (list, tuple)):
                return tuple(map(self.value, value))
            if isinstance(value, Mapping):  # a Triton kernel's writes, by argument
                return ("mapping", tuple((key, self.value(item)) for key, item in value.items()))
            return self.literal(value)
        # No storage offset: it follows from the arguments and the operands' offsets, which differ
        # if tensors are views of a checkpoint's file.
        strides: Hashable = ("unknown", _Identity(value))
        if value.layout is torch.strided:
            strides = self.sizes(value.stride())
        shape = self.sizes(value.shape)
        flags = (value.is_conj(), value.is_neg())
        return ("tensor", value.__class__, value.dtype, value.device, shape, strides, flags)

    def sizes(self, sizes: Sequence[Any]) -> Hashable:
        """Sizes or strides; symbols are described as in `literal`."""
        return tuple(
            [
                size if isinstance(size, int) else ("symbol", self.expression(size.node.expr))
                for size in sizes
            ]
        )


@dataclass(frozen=True, eq=False)
class _Identity:
    """Equal only for the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _constant(value: Any) -> Hashable:
    """A module attribute; equal for tensors of equal metadata and bits."""
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    if not plain or isinstance(value, FakeTensor):
        return _Identity(value)
    with unset_fake_temporarily():  # passes run while AOTAutograd's fake mode is on
        octets = value.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        bits = octets.numpy().tobytes()
    return (value.__class__, value.dtype, value.device, tuple(value.shape), bits)
