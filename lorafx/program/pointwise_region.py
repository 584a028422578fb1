"""The computation of a product's input, as an expression for a kernel.

    h = mul(silu(y[:, :K]), y[:, K:])   →   Activation(g0 = y[m, k], g1 = y[m, K + k], …), (y,)

The region reaches from h back through pointwise operators, slices of columns and casts to leaves:
float tensors with a row for each row of h, or rows gathered from a table.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lorafx.kernels.triton.source import TYPES, Activation, Leaf, Load
from lorafx.op_arguments import bound, index_of, operand
from lorafx.program.frame import fake_value

aten, prims = torch.ops.aten, torch.ops.prims

_EXP = "1 / (1 + tl.exp(-({0})))"
_ALL = "propagate_nan=tl.PropagateNan.ALL"
#: Operator → Triton expression of float32 operands.
FORMS: Mapping[Any, str] = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.mul.Tensor: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.neg.default: "-{0}",
    aten.abs.default: "tl.abs({0})",
    aten.exp.default: "tl.exp({0})",
    aten.erf.default: "tl.erf({0})",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.reciprocal.default: "1 / {0}",
    aten.sigmoid.default: _EXP,
    aten.silu.default: "{0} / (1 + tl.exp(-({0})))",
    aten.tanh.default: "1 - 2 / (1 + tl.exp(2 * {0}))",
    aten.relu.default: f"tl.maximum({{0}}, 0.0, {_ALL})",
    aten.maximum.default: f"tl.maximum({{0}}, {{1}}, {_ALL})",
    aten.minimum.default: f"tl.minimum({{0}}, {{1}}, {_ALL})",
    aten.clamp_min.default: f"tl.maximum({{0}}, {{1}}, {_ALL})",
    aten.clamp_max.default: f"tl.minimum({{0}}, {{1}}, {_ALL})",
}
POWERS: Mapping[float, str] = {2: "{0} * {0}", 3: "{0} * {0} * {0}"}
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
SAME = frozenset({aten.alias.default, aten.clone.default, aten.detach.default})
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default})
#: Larger regions would exhaust a kernel's registers.
MOST_LINES, MOST_LEAVES, MOST_LOADS = 40, 4, 8


@dataclass(frozen=True)
class PointwiseRegion:
    """h as an expression, its leaves (…, W) in the kernels' order, and the replaced nodes."""

    activation: Activation
    inputs: tuple[fx.Node, ...]
    inside: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class NoRegion:
    """Why h is no such expression."""

    reason: str


class _Unknown(Exception):
    pass


def region_of(h: Any) -> PointwiseRegion | NoRegion:
    """The region of h (…, K). Pure; the graph is only read."""
    value = fake_value(h) if isinstance(h, fx.Node) else None
    if value is None or value.dim() < 2 or value.dtype not in TYPES:
        return NoRegion("it is not a matrix of 16- or 32-bit floats")
    if not isinstance(value.shape[-1], int):
        return NoRegion("its number of columns is not constant")
    builder = _Builder(tuple(value.shape[:-1]))
    try:
        result = builder.value(h, 0, 1)
    except _Unknown as error:
        return NoRegion(str(error))
    if not builder.lines:
        made = getattr(h.target, "__name__", h.target)  # the same in every layer
        return NoRegion(f"{made} is not a supported pointwise operator")
    leaves, inputs = [], []
    for table, ids in builder.leaves:
        leaves.append(Leaf(fake_value(table).dtype, ids is not None))
        inputs += [table] if ids is None else [table, ids]
    loads = tuple(Load(*load) for load in builder.loads)
    inside = frozenset(node for node, _, _ in builder.named) - frozenset(inputs)
    return PointwiseRegion(
        Activation(tuple(leaves), loads, tuple(builder.lines), result), tuple(inputs), inside
    )


@dataclass
class _Builder:
    """Names of values: columns start + step · k of a node."""

    rows: tuple[Any, ...]
    lines: list[str] = field(default_factory=list)
    loads: list[tuple[int, int, int]] = field(default_factory=list)
    leaves: list[tuple[fx.Node, fx.Node | None]] = field(default_factory=list)
    named: dict[tuple[fx.Node, int, int], str] = field(default_factory=dict)

    def value(self, node: fx.Node, start: int, step: int) -> str:
        key = (node, start, step)
        if key not in self.named:
            self.named[key] = self._computed(node, start, step)
        return self.named[key]

    def _computed(self, node: fx.Node, start: int, step: int) -> str:
        columns = _columns(node)
        if columns is not None:
            source, first, stride = columns
            return self.value(source, first + stride * start, stride * step)
        if node.target in SAME:
            return self.value(operand(node), start, step)
        if node.target in CASTS and _float(operand(node)):
            return self._cast(node, self.value(operand(node), start, step))
        form = _form(node)
        if form is None:
            return self._leaf(node, start, step)
        operands = [
            self._operand(node, item, start, step)
            for name, item in bound(node).items()
            if name != "alpha" and item is not None
        ]
        return self._line(form.format(*operands))

    def _operand(self, node: fx.Node, item: Any, start: int, step: int) -> str:
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            if not math.isfinite(item):
                raise _Unknown(f"{node.name} has the operand {item}")
            return f"({float(item)!r})"
        if not isinstance(item, fx.Node):
            raise _Unknown(f"{node.name} has the operand {item}")
        value, whole = fake_value(item), fake_value(node)
        if not isinstance(value, torch.Tensor) or value.dim() != whole.dim():
            raise _Unknown(f"{node.name} takes {item.name}, which does not have one entry per row")
        if isinstance(value.shape[-1], int) and value.shape[-1] == 1 != whole.shape[-1]:
            return self.value(item, 0, 0)
        if tuple(value.shape) != tuple(whole.shape):
            raise _Unknown(f"{node.name} takes {item.name}, which has another shape")
        return self.value(item, start, step)

    def _cast(self, node: fx.Node, name: str) -> str:
        dtype = fake_value(node).dtype
        if dtype not in TYPES:
            raise _Unknown(f"{node.name} casts to {dtype}")
        if dtype == torch.float32:
            return name
        return self._line(f"{name}.to({TYPES[dtype]}).to(tl.float32)")

    def _leaf(self, node: fx.Node, start: int, step: int) -> str:
        value = fake_value(node)
        if not isinstance(value, torch.Tensor) or tuple(value.shape[:-1]) != self.rows:
            raise _Unknown(f"{node.name} does not have one entry per row")
        if value.dtype not in TYPES:
            raise _Unknown(f"{node.name} is {value.dtype}")
        leaf = _gathered(node) or (node, None)
        if leaf not in self.leaves:
            self.leaves.append(leaf)
        self.loads.append((self.leaves.index(leaf), start, step))
        if len(self.leaves) > MOST_LEAVES or len(self.loads) > MOST_LOADS:
            raise _Unknown(f"it reads more than {MOST_LEAVES} tensors at {MOST_LOADS} places")
        return f"g{len(self.loads) - 1}"

    def _line(self, expression: str) -> str:
        if len(self.lines) == MOST_LINES:
            raise _Unknown(f"it has more than {MOST_LINES} operators")
        self.lines.append(f"t{len(self.lines)} = {expression}")
        return f"t{len(self.lines) - 1}"


def _form(node: fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or value.dtype not in TYPES:
        return None
    if node.target is aten.pow.Tensor_Scalar:
        exponent = bound(node)["exponent"]
        return POWERS.get(exponent) if isinstance(exponent, (int, float)) else None
    if node.target is aten.clamp.default:
        call = bound(node)
        low, high = call["min"], call["max"]
        if low is None or high is None:
            return FORMS[aten.clamp_max.default if low is None else aten.clamp_min.default]
        return f"tl.minimum({FORMS[aten.clamp_min.default]}, {{2}}, {_ALL})"
    form = FORMS.get(node.target)
    return form if form is not None and bound(node).get("alpha", 1) == 1 else None


def _columns(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(source, start, step) where `node` is columns of `source`."""
    if node.target is aten.slice.Tensor:
        return _slice(node)
    if node.target is operator.getitem:
        split, index = operand(node), index_of(node)
        if split.target not in SPLITS or not isinstance(index, int):
            return None
        call = bound(split)
        source = call["self"]
        sizes = call["split_size" if split.target is aten.split.Tensor else "split_sizes"]
        if call["dim"] not in (fake_value(source).dim() - 1, -1):
            return None
        first = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
        return source, first, 1
    return None


def _slice(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    call = bound(node)
    source, dim, start, step = call["self"], call["dim"], call["start"] or 0, call["step"]
    shape = fake_value(source).shape
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    if dim not in (len(shape) - 1, -1):  # all rows, or none that a kernel could count
        return (source, 0, 1) if tuple(shape) == tuple(fake_value(node).shape) else None
    width = shape[-1]
    if not isinstance(width, int) or not -width <= start < width:
        return None
    return source, start % width, step


def _gathered(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(table, ids) where `node` is rows table[ids] of a matrix."""
    if node.target is not aten.index.Tensor:
        return None
    call = bound(node)
    table, indices = call["self"], call["indices"]
    whole = len(indices) == 1 and fake_value(table).dim() == 2
    if not whole or fake_value(indices[0]).dtype not in (torch.int32, torch.int64):
        return None
    return (table, indices[0]) if fake_value(indices[0]).dim() == 1 else None


def _float(node: Any) -> bool:
    value = fake_value(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in TYPES
