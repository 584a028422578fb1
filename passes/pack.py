"""Siblings proved to share x become one node over the packed weight and the group's bank.

    y_i = x W_iᵀ + b_i + Δ_i(x)   →   [y_0 | y_1 | ...] = fused_linear(x, [W_0; W_1; ...], ...)

Siblings share x if it is the same node. The packed weight, which `pack_weights` made, is a graph
input that the mark takes (lorafx.model.packing), so a graph serves all layers.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lorafx.kernels.ops.op_library import BankArgs, Ranges
from lorafx.model.module_graph import joined_lines
from lorafx.model.packing import PackedGroup, pack_weights
from lorafx.op_arguments import bound, in_order
from lorafx.program.context import FUSED_OP, Context, SiteState
from lorafx.program.frame import fake_value
from lorafx.program.program import Preparation

aten = torch.ops.aten

#: Nodes whose result shares its operand's memory for any strides.
ALIASES = frozenset(
    {aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor}
    | {aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.alias.default}
    | {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.split.Tensor}
    | {aten.split_with_sizes.default, aten.unfold.default, aten.detach.default, operator.getitem}
)
#: Views that require some strides; `reshape` computes the same for any.
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
#: Operators that address memory by the traced strides.
ADDRESSING = frozenset(
    {aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default}
    | {aten.view_as_real.default}
)


@dataclass(frozen=True)
class Pack:
    """Siblings with the same x become one node."""

    name: str = "pack"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        edits = 0
        for nodes in _nodes_by_input(ctx):
            for run in _adjacent_runs(ctx, nodes):
                if len(run) > 1:
                    _merge(ctx, run, first=min(run, key=order.__getitem__))
                    edits += 1
        return edits


def _nodes_by_input(ctx: Context) -> list[list[fx.Node]]:
    """Fused nodes grouped by x, bank, slots, rows and packed weight."""
    buckets: dict[tuple[object, ...], list[fx.Node]] = {}
    for node, (state, *_) in ctx.states.items():
        if node.target is FUSED_OP and state.packed_weight is not None:
            call = bound(node)
            shared = (call[name] for name in ("x", *BankArgs._fields, "rows"))
            key = (*shared, state.packed_weight, state.packed_bias)
            buckets.setdefault(key, []).append(node)
    return list(buckets.values())


def _adjacent_runs(ctx: Context, nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Runs of nodes whose outputs are adjacent in the packed weight, in its order."""
    runs: list[list[fx.Node]] = []
    end = None
    for node in sorted(nodes, key=lambda item: bound(item)["offsets"][0]):
        call = bound(node)
        offset, size = call["offsets"][0], sum(call["sizes"])
        if call["bias"] is not None and ctx.states[node][0].packed_bias is None:
            continue
        if runs and offset == end:
            runs[-1].append(node)
        else:
            runs.append([node])
        end = offset + size
    return runs


def _merge(ctx: Context, run: list[fx.Node], first: fx.Node) -> None:
    state: SiteState = ctx.states[run[0]][0]
    calls = [bound(node) for node in run]
    ranges = {name: [n for call in calls for n in call[name]] for name in Ranges._fields}
    start, widths = ranges["offsets"][0], [sum(call["sizes"]) for call in calls]
    base: dict[str, fx.Node | None] = {"bias": None}
    with ctx.graph.inserting_before(first):
        base["weight"] = _slice_rows(ctx, state.packed_weight, start, sum(widths))
        if any(call["bias"] is not None for call in calls):
            base["bias"] = _slice_rows(ctx, state.packed_bias, start, sum(widths))
        packed = ctx.emit(FUSED_OP, *in_order(FUSED_OP, calls[0], **base, **ranges))
        split = ctx.emit(aten.split_with_sizes.default, packed, widths, -1)
        parts = [ctx.emit(operator.getitem, split, index) for index in range(len(run))]
    packed.meta.update({key: first.meta[key] for key in ("stack_trace",) if key in first.meta})
    for node, part in zip(run, parts, strict=True):
        node.replace_all_uses_with(part)
        _allow_strides(ctx, part)
    ctx.merge(run, packed, "packed")


def _allow_strides(ctx: Context, part: fx.Node) -> None:
    """Adapt the readers of `part`, columns of the packed y, to its strides: views that merge rows
    become reshapes, operators that address memory get a contiguous copy."""
    pending, seen = [part], {part}
    while pending:
        for user in list(pending.pop().users):
            if user in seen:
                continue
            seen.add(user)
            if user.target in ADDRESSING:
                readers = list(part.users)
                with ctx.graph.inserting_after(part):
                    copy = ctx.emit(aten.clone.default, part, memory_format=torch.contiguous_format)
                for reader in readers:
                    reader.replace_input_with(part, copy)
                return
            if user.target in VIEWS:
                user.target = aten.reshape.default
            if user.target in ALIASES or user.target in VIEWS:
                pending.append(user)


def _slice_rows(ctx: Context, packed: fx.Node | None, start: int, count: int) -> fx.Node | None:
    if packed is None or (start == 0 and count == fake_value(packed).shape[0]):
        return packed
    return ctx.emit(aten.slice.Tensor, packed, 0, start, start + count)


_NOT_PACKED = (
    "keep weights of their own: not all are plain dense parameters that nothing else shares, "
    "of one dtype and device"
)


@dataclass(frozen=True)
class PackWeights:
    """The weights of siblings become views of one buffer (ΣN, K), with the same values, before the
    first graph is made."""

    name: ClassVar[str] = "pack_weights"

    def run(self, model: Preparation) -> int:
        # Only `pack` reads packed weights, and it merges nodes of `fuse`.
        if not (model.options.runs("pack") and model.options.runs("fuse")):
            model.notes.append("nothing: the pass pack, or fuse, is switched off")
            return 0
        attachment = model.attachment
        assert attachment is not None
        unshared = model.graph.unshared()
        packed: list[PackedGroup] = []
        notes: list[tuple[str, str]] = []
        for group in attachment.groups:
            pack = pack_weights(model.graph, group, unshared)
            members = " + ".join(group.members)
            if pack is None:
                if len(group.sites) > 1:
                    notes.append((group.parent, f"{members} {_NOT_PACKED}"))
                continue
            notes.append((group.parent, f"the weights of {members} are views of one buffer"))
            packed.append(pack)
            for site in group.sites:
                mark = attachment.marks[site.path]
                mark.weight, mark.bias = pack.weight, pack.bias
        model.packed = tuple(packed)
        model.notes += joined_lines(notes)
        return len(packed)
