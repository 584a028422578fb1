"""LoRA nodes become the operators of the chosen lowering.

    inductor   fused_linear → mm / addmm (one, or one per sibling), then add_delta_ into its output;
               site → add_delta_ into y; expert_site → run_expert_delta_ into y, or as a site whose
               slots are the keys of the rows. If y is a grouped product with a kernel, it becomes
               lorafx::grouped_mm.
    triton     fused_linear → triton_linear, or mm / addmm and triton_delta_, or triton_concat_ and
               mm / addmm, as planned; site → triton_delta_ into y.
    reference  the graph is unchanged: the ops' aten implementations run.

grouped_site and conv_site are unchanged. Ops that write are wrapped in `auto_functionalized`. On a
GPU the Triton ops become launches of their kernels:

    y' = auto_functionalized(lorafx::triton_delta_, y, x, …)[1]
 →  y' = triton_kernel_wrapper_functional(kernel, grid, {y_ptr: y, …}, clone [y_ptr])['y_ptr']

Each op's body is traced on the node's fake tensors and functionalised, since AOTAutograd has run
before `lower`. Inductor can then plan the kernels' memory, capture them in CUDA graphs and package
them ahead of time. Bodies share computations, such as the order of the requests by slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from lorafx.kernels.cost.roofline import FUSED
from lorafx.kernels.cpu.delta_kernels import delta_call
from lorafx.kernels.cpu.grouped_mm import GROUPED_MM, kernel_of
from lorafx.kernels.ops.linear_ops import ADD_DELTA, expert_keys
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton import ops as triton_ops
from lorafx.kernels.triton.build import CONCAT, plan_of
from lorafx.kernels.triton.ops import adjacent
from lorafx.op_arguments import bound, in_order
from lorafx.program.context import (
    EMBEDDING_OP,
    EXPERT_OP,
    FUSED_OP,
    PLAIN_SITE_OPS,
    SITE_OP,
    Context,
    call_in_place,
    written_by,
)
from lorafx.program.expert_sites import ALIKE
from lorafx.program.frame import fake_value
from lorafx.program.inline_triton import inline_triton_ops
from lorafx.program.strategies import GENERATED, cpu_spec, delta_spec, strategy_of
from lorafx.program.weight_uses import grouped, is_grouped
from lorafx.torch_internals.graph_parts import (
    guard_or_false,
    guard_or_true,
)
from lorafx.torch_internals.shortcuts import chosen

aten = torch.ops.aten


EXPERT_SLOTS = torch.ops.lorafx.expert_slots.default
ADD_EMBEDDING_DELTA = torch.ops.lorafx.add_embedding_delta_.default
TRITON_LINEAR = triton_ops.triton_linear._opoverload
TRITON_DELTA = triton_ops.triton_delta_._opoverload
TRITON_EMBEDDING_DELTA = triton_ops.triton_embedding_delta_._opoverload
TRITON_CONCAT = triton_ops.triton_concat_._opoverload
TRITON_OPS = (TRITON_LINEAR, TRITON_DELTA, TRITON_EMBEDDING_DELTA, TRITON_CONCAT)


@dataclass(frozen=True)
class Lower:
    """Nodes become the operators of the chosen lowering."""

    name: str = "lower"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.program.options.lowering == "reference":
            return 0
        nodes = [node for node in ctx.states if node.target not in PLAIN_SITE_OPS]
        lowered = {}
        for node in nodes:
            with gm.graph.inserting_before(node):
                lowered[node] = _LOWERINGS[node.target](ctx, node)
            node.replace_all_uses_with(lowered[node])
        for node in nodes:
            ctx.states[lowered[node]] = ctx.states.pop(node)
        if ctx.kernels and any(fake_value(node).device.type != "cpu" for node in ctx.states):
            early = "early_launches" in chosen(ctx.program.options.shortcuts)
            for old, new in inline_triton_ops(gm, TRITON_OPS, early=early).items():
                if old in ctx.states:
                    ctx.states[new] = ctx.states.pop(old)
        return len(nodes)


def _linear(ctx: Context, node: fx.Node) -> fx.Node:
    call, strategy = bound(node), strategy_of(node)
    x, weight, bias = call["x"], call["weight"], call["bias"]
    x_flat = _flat(ctx, x)
    if strategy.name in FUSED:
        rows = _contiguous_rows(ctx, x_flat)
        arguments = in_order(TRITON_LINEAR, call, x=rows, kernel=strategy.kernel)
        return _unflattened(ctx, ctx.emit(TRITON_LINEAR, *arguments), x, node)
    if strategy.name == CONCAT:
        y = _concat(ctx, strategy.kernel, {**call, "x": _contiguous_rows(ctx, x_flat)})
        return _unflattened(ctx, y, x, node)
    if strategy.split:
        parts, start = [], 0
        for size in call["sizes"]:
            part = ctx.emit(aten.slice.Tensor, weight, 0, start, start + size)
            part_bias = bias and ctx.emit(aten.slice.Tensor, bias, 0, start, start + size)
            parts.append(_product(ctx, x_flat, part, part_bias, swap=False))
            start += size
        y = ctx.emit(aten.cat.default, parts, 1)  # Inductor has each GEMM write its part
    else:
        y = _product(ctx, x_flat, weight, bias, swap=call["transposed"])
    written = _add_delta(ctx, node, {**call, "y": y, "x": x_flat})
    return _unflattened(ctx, written, x, node)


def _concat(ctx: Context, kernel: int, call: dict[str, Any]) -> fx.Node:
    """x', W' = triton_concat_([x | …], [W | …], bank); y = x' W'ᵀ + b: the vendor's GEMM with a
    longer x (M, K) and W. Both come from aten.cat, so Inductor computes x directly into x'."""
    spec = plan_of(kernel).spec
    blocks = fake_value(call["slots" if spec.by_request else "B"]).shape[0]
    columns = triton_ops.columns_of(spec, blocks)
    extended = {
        "x": _extend(ctx, call["x"], 1, columns),
        "w": _extend(ctx, call["weight"], 0 if call["transposed"] else 1, columns),
    }
    x, weight = written_by(TRITON_CONCAT, {**call, **extended, "kernel": kernel}, "x", "w")
    return _product(ctx, x, weight, call["bias"], swap=call["transposed"])


def _extend(ctx: Context, tensor: fx.Node, dim: int, count: int) -> fx.Node:
    value, length = fake_value(tensor), ctx.size(tensor, 1 - dim)
    settings = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    sizes = [count, length] if dim == 0 else [length, count]
    return ctx.emit(
        aten.cat.default, [tensor, ctx.emit(aten.full.default, sizes, 0.0, **settings)], dim
    )


def _product(
    ctx: Context, x: fx.Node, weight: fx.Node, bias: fx.Node | None, *, swap: bool
) -> fx.Node:
    right = weight if swap else ctx.emit(aten.permute.default, weight, [1, 0])
    if bias is None:
        return ctx.emit(aten.mm.default, x, right)
    return ctx.emit(aten.addmm.default, bias, x, right)


def _site(ctx: Context, node: fx.Node) -> fx.Node:
    call = bound(node)
    y = _writable(ctx, call["y"])
    if not strategy_of(node).kernel and _same_strides(y, node):
        # These kernels take any row layout; flattening might copy x and y.
        return _add_delta(ctx, node, {**call, "y": y})
    flat = {"y": _flat(ctx, y), "x": _flat(ctx, call["x"])}
    written = _add_delta(ctx, node, {**call, **flat})
    return _unflattened(ctx, written, y, node)


def _experts(ctx: Context, node: fx.Node) -> fx.Node:
    call = bound(node)
    y = _with_generated_kernel(ctx, call["y"])
    flat = {"y": _flat(ctx, y), "x": _flat(ctx, call["x"])}
    return _unflattened(ctx, _expert_delta(ctx, node, {**call, **flat}), y, node)


def _with_generated_kernel(ctx: Context, y: fx.Node) -> fx.Node:
    """y, which becomes lorafx::grouped_mm if it is a grouped product with a kernel."""
    if not is_grouped(y) or ctx.program.options.lowering != "inductor":
        return y
    x, weight, offs, plain = grouped(y)
    values = fake_value(x), fake_value(weight)
    known = plain and values[0].dtype == values[1].dtype and kernel_of(*values) is not None
    if y.target is GROUPED_MM or not known:
        return y
    with ctx.graph.inserting_before(y):
        product = ctx.emit(GROUPED_MM, x, weight, offs)
    y.replace_all_uses_with(product)
    ctx.graph.erase_node(y)
    return product


def _expert_delta(ctx: Context, node: fx.Node, call: dict[str, Any]) -> fx.Node:
    """y (M, N) with the delta; `call` has the arguments of `expert_site`."""
    alike = ctx.field_of_same_bank(call["A"], ALIKE)
    if strategy_of(node).name == GENERATED and alike is not None:
        ends = _ends_of_experts(call["experts"], call["count"])
        experts = call["experts"] if ends is None else ends
        tensors, sorted_rows = (*_operands(call), alike, experts), ends is not None
        settings = {"rows": call["rows"], "ends": sorted_rows}
        generated = delta_call(cpu_spec(node), *tensors, **settings)
        if generated is not None:
            return call_in_place(*generated)
    capacity = fake_value(call["ranks"]).shape[0] // call["count"]
    if strategy_of(node).kernel and call["rows"] != 0:
        keys = _expert_slots(ctx, call, capacity)
    else:
        keys = ctx.emit(EXPERT_SLOTS, *in_order(EXPERT_SLOTS, call, capacity=capacity))
    return _add_delta(ctx, node, {**call, "slots": keys, "rows": 1})


def _expert_slots(ctx: Context, call: dict[str, Any], capacity: int) -> fx.Node:
    """`lorafx::expert_slots` in aten, which Inductor fuses. Kernels of a GPU check no slots."""
    owner = ctx.row_slots(call["slots"], call["rows"], ctx.size(call["experts"], 0))
    keys = partial(expert_keys, count=call["count"], capacity=capacity)
    return ctx.traced(keys, owner, call["experts"])


def _ends_of_experts(experts: fx.Node, count: int) -> fx.Node | None:
    """The ends of each expert's rows, if `match` read `experts` from them."""
    if experts.target is not aten.searchsorted.Tensor or not bound(experts)["right"]:
        return None
    ends: fx.Node = bound(experts)["sorted_sequence"]
    numbers = bound(experts)["self"]
    if fake_value(ends).shape[0] != count or numbers.target is not torch.ops.prims.iota.default:
        return None
    first, step = (bound(numbers)[name] for name in ("start", "step"))
    return ends if first == 0 and step == 1 else None


def _embedding(ctx: Context, node: fx.Node) -> fx.Node:
    call, strategy = bound(node), strategy_of(node)
    y = call["y"] = _writable(ctx, call["y"])
    if strategy.kernel:
        flat = ctx.emit(aten.reshape.default, call["ids"], [-1])
        call["y"] = _contiguous_rows(ctx, _flat(ctx, y))
        call["ids"] = _contiguous_rows(ctx, flat)
        arguments = in_order(TRITON_EMBEDDING_DELTA, call, kernel=strategy.kernel)
        return _unflattened(ctx, call_in_place(TRITON_EMBEDDING_DELTA, arguments), y, node)
    if strategy.name == GENERATED:
        tensors = _operands(call, "ids")
        return call_in_place(*delta_call(delta_spec(node), *tensors, rows=call["rows"]))
    return call_in_place(ADD_EMBEDDING_DELTA, in_order(ADD_EMBEDDING_DELTA, call))


def _add_delta(ctx: Context, node: fx.Node, call: dict[str, Any]) -> fx.Node:
    strategy = strategy_of(node)
    if strategy.kernel:
        contiguous = {name: _contiguous_rows(ctx, call[name]) for name in ("y", "x")}
        arguments = in_order(TRITON_DELTA, call, **contiguous, kernel=strategy.kernel)
        return call_in_place(TRITON_DELTA, arguments)
    if strategy.name == GENERATED:
        return call_in_place(*delta_call(delta_spec(node), *_operands(call), rows=call["rows"]))
    return call_in_place(ADD_DELTA, in_order(ADD_DELTA, call))


def _operands(call: dict[str, Any], x: str = "x") -> tuple[Any, ...]:
    return tuple(call[name] for name in ("y", x, *BankArgs._fields))


def _flat(ctx: Context, node: Any) -> fx.Node:
    value = fake_value(node)
    if value.dim() == 2:
        return node
    return ctx.emit(aten.reshape.default, node, [-1, value.shape[-1]])


def _writable(ctx: Context, y: fx.Node) -> fx.Node:
    """y, or a copy if it is broadcast: each row is written."""
    value = fake_value(y)
    if all(guard_or_true(stride != 0) for stride in value.stride()):
        return y
    return ctx.emit(aten.clone.default, y, memory_format=torch.contiguous_format)


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    strides = zip(fake_value(a).stride(), fake_value(b).stride(), strict=True)
    return all(guard_or_false(x == y) for x, y in strides)


def _contiguous_rows(ctx: Context, node: fx.Node) -> fx.Node:
    """`node`, or a copy if its rows are not contiguous, which Triton kernels need."""
    if adjacent(fake_value(node)):
        return node
    return ctx.emit(aten.clone.default, node, memory_format=torch.contiguous_format)


def _unflattened(ctx: Context, y: fx.Node, source: Any, like: fx.Node) -> fx.Node:
    """y (M, N) in the shape of `like`, with the leading sizes of `source`."""
    value = fake_value(like)
    if value.dim() == 2:
        return y
    leading = [ctx.size(source, dim) for dim in range(value.dim() - 1)]
    return ctx.emit(aten.reshape.default, y, [*leading, value.shape[-1]])


_LOWERINGS: dict[Any, Callable[..., fx.Node]] = {
    SITE_OP: _site,
    EXPERT_OP: _experts,
    EMBEDDING_OP: _embedding,
    FUSED_OP: _linear,
}
