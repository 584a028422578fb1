"""With `Options(batch_invariant=True)`: no operator's additions depend on the batch.

What is left of a graph when products and attention are generated must be

    pointwise, or moves numbers       Inductor's vectors compute each number alike, in tails too
    largest, any, sums of integers    exact in any order
    a sum over sizes that are fixed   in one loop by one thread, which `InductorLowering` sees to
    a product over one number         nothing is added
    an op of lorafx whose order of additions depends on the row alone

Everything else is refused by name, before anything runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.errors import CaptureError, some
from lorafx.kernels.cpu.dense_attention import ATTENTION
from lorafx.kernels.cpu.weight_mm import WEIGHT_MM, WEIGHT_MM_DELTA, WEIGHT_MMS_DELTA
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION
from lorafx.kernels.ops.row_ops import CHECKED_INDEX
from lorafx.op_arguments import bound, is_view, op_of
from lorafx.ownership.flow import place
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.graph_parts import OpOverload

aten, prims, lora = torch.ops.aten, torch.ops.prims, torch.ops.lorafx

#: The key in a graph module's `meta` by which `InductorLowering` knows of sums of few rows.
FEW_SUMS = "sums of few rows"

#: lorafx's own, some in a form that is `fixed`.
_OF_ROWS = {CHECKED_INDEX, lora.run_delta_.default, lora.run_embedding_delta_.default}
_FIXED = {WEIGHT_MM, WEIGHT_MM_DELTA, WEIGHT_MMS_DELTA, ATTENTION, PAGED_ATTENTION}
#: Operators that make or move numbers, beside views and what is tagged as pointwise.
_MOVES = {
    *(aten.clone, aten.cat, aten.stack, aten.index, aten.embedding, aten.gather, aten.copy),
    *(aten.index_select, aten.index_put, aten.scatter, aten.slice_scatter, aten.select_scatter),
    *(aten.constant_pad_nd, aten.repeat, aten.flip, aten.roll, aten.full, aten.full_like),
    *(aten.scalar_tensor, aten.arange, aten.empty, aten.zeros, aten.ones, aten.lift_fresh_copy),
    *(aten.empty_strided, aten.new_empty, aten.tril, aten.triu, aten.sym_size, aten._unsafe_view),
    *(aten.view, aten.reshape, aten._to_copy, aten._assert_tensor_metadata, prims.iota),
    *(prims.convert_element_type, aten.index_copy, aten.argmax, aten.argmin, aten.topk, aten.sort),
}
_EXACT = {aten.amax, aten.amin, aten.max, aten.min, aten.any, aten.all}
_SUMS = {
    aten.sum,
    aten.mean,
    aten.var,
    aten.var_mean,
    aten.cumsum,
    aten.prod,
    aten.linalg_vector_norm,
}
_PRODUCTS = {aten.mm, aten.bmm}


@dataclass(frozen=True)
class CheckOrder:
    """With batch_invariant, no operator's additions depend on the batch."""

    name: str = "check_order"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if not ctx.program.options.batch_invariant:
            return 0
        if ctx.program.in_pieces:
            raise CaptureError(
                "Options(batch_invariant=True): the model's forward runs in pieces, and Python "
                "between them computes with torch's operators, whose bits depend on the batch; "
                "avoid what breaks the graph (TORCH_LOGS=graph_breaks names it), or leave the "
                "option out"
            )
        refused = [node for node in gm.graph.nodes if not _holds(node)]
        if refused:
            names = dict.fromkeys(_name(ctx, node) for node in refused)
            raise CaptureError(
                "Options(batch_invariant=True): the bits that some operators compute may depend on "
                f"the batch: {some(names)}. {_way_out(refused)}"
            )
        sums = [node for node in gm.graph.nodes if _packet(node) in _SUMS]
        gm.meta[FEW_SUMS] = any(isinstance(_count(node), int) for node in sums)
        return 0


def _packet(node: fx.Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else None


def _count(node: fx.Node) -> Any:
    value = node.meta["val"]
    return (value[0] if isinstance(value, (tuple, list)) else value).numel()


def _name(ctx: Context, node: fx.Node) -> str:
    inputs = [ctx.frame.by_node.get(item) for item in node.all_input_nodes]
    sites = [site.path for item in inputs if item is not None for site in item.sites]
    return f"{op_of(node)} ({sites[0] if sites else place(node)})"


def _way_out(refused: Sequence[fx.Node]) -> str:
    if any(node.target is aten.bmm.default for node in refused):
        return 'For attention, call model.set_attn_implementation("sdpa"); or leave the option out'
    return "Leave the option out for this model"


def _holds(node: fx.Node) -> bool:
    """Whether the bits of a row are the same in any batch."""
    op = op_of(node)
    if not isinstance(op, OpOverload):  # sizes, and items of results
        return node.op != "call_function" or op is operator.getitem or not _is_tensor(node)
    if op in _FIXED:
        return bool(bound(node)["fixed"])
    packet = op.overloadpacket
    if op in _OF_ROWS or packet in _MOVES or packet in _EXACT or is_view(node):
        return not bound(node).get("accumulate", False)
    if packet in _PRODUCTS:
        return bool(fake_value(bound(node)["self"]).shape[-1] == 1)
    if packet in _SUMS:
        return _sums_alike(node)
    return torch.Tag.pointwise in op.tags


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _sums_alike(node: fx.Node) -> bool:
    """Whether a sum is exact, or over sizes that no batch changes."""
    call = bound(node)
    x = fake_value(call["self"])
    if not x.is_floating_point():
        return True
    dims: Any = call.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else dims
    return all(isinstance(x.shape[dim], int) for dim in ([dims] if isinstance(dims, int) else dims))
