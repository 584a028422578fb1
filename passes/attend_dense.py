"""Attention on a CPU reads keys and values once for all heads of queries that share them.

    y, … = attention(q, repeat(k), repeat(v), mask)  →  y = lorafx::attention(q, k, v, mask)

`repeat` is a copy of each head of keys for each head of queries in its group; without one, keys
have as many heads as queries. The call needs a generated kernel, and the statistics of torch's
operator have no reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.kernels.cpu.dense_attention import ATTENTION, GENERATED, AttentionForm
from lorafx.op_arguments import bound, operand
from lorafx.program.attention_nodes import only_result, same_sizes, scale_of, take_place
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.cpu import has_matrix_tiles

aten = torch.ops.aten

_BY_TORCH = aten._scaled_dot_product_flash_attention_for_cpu.default
#: Operators that keep the order of elements, and the last three the elements too.
_COPIES = (aten.clone.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_VIEWS = (aten.unsqueeze.default, aten.slice.Tensor, aten.expand.default)


@dataclass(frozen=True)
class AttendDense:
    """Attention on a CPU reads keys and values once for all heads that share them."""

    name: str = "attend_dense"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.program.options.lowering != "inductor":
            return 0
        edits, fixed = 0, ctx.program.options.batch_invariant
        for attention in gm.graph.find_nodes(op="call_function", target=_BY_TORCH):
            result, call = only_result(attention), bound(attention)
            if result is None or call["dropout_p"]:
                continue
            query, key, value, mask = (call[n] for n in ("query", "key", "value", "attn_mask"))
            shared = _before_repeat(key), _before_repeat(value)
            if shared[0] is not None and shared[1] is not None:
                key, value = shared
            form = AttentionForm.of(*fx.map_arg((query, key, value, mask), fake_value), fixed=fixed)
            if (
                form is None
                or not _is_quicker(form, fake_value(query))
                or not GENERATED.ready(form)
            ):
                continue
            masks = [] if mask is None else [mask]
            arguments: tuple[Any, ...] = query, key, value, masks, call["is_causal"], scale_of(call)
            if fixed:
                arguments = (*arguments, fixed)
            take_place(ctx, attention, result, ATTENTION, *arguments)
            _erase_unused(gm.graph, [result, attention, call["key"], call["value"]])
            edits += 1
        return edits


def _is_quicker(form: AttentionForm, query: torch.Tensor) -> bool:
    """Whether the kernel is known to take less time than torch's operator, which multiplies many
    queries in bfloat16 by the matrix tiles of a CPU that has them."""
    one = isinstance(query.shape[2], int) and query.shape[2] == 1
    return one or form.fixed or form.dtype != torch.bfloat16 or not has_matrix_tiles()


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """The (B, heads, N, D) of which `node`, (B, heads · G, N, D), has each head G times; None if it
    is no such copy."""
    B, heads, N, D = fake_value(node).shape
    shared = None  # the sizes before the copies, once they have been found
    while node.target in (*_COPIES, *_VIEWS):
        source = operand(node)
        before, after = fake_value(source).shape, fake_value(node).shape
        if node.target in _VIEWS[1:] and not same_sizes(before, after):
            if shared is not None or not _repeats(before, after, (B, heads, N, D)):
                return None
            shared = B, after[1], N, D
        node = source
        if shared is not None and same_sizes(before, shared):
            return node
    return None


def _repeats(before: Sequence[Any], after: Sequence[Any], result: Sequence[Any]) -> bool:
    """Whether a step from one of these sizes to the other repeats each head for its group, so that
    the heads of `result` are all of them."""
    if len(before) != 5 or len(after) != 5 or not isinstance(after[2], int):
        return False
    (B, heads, N, D), (_, shared, group, *_) = result, after
    return (
        same_sizes(before, (B, shared, 1, N, D))
        and same_sizes(after, (B, shared, group, N, D))
        and same_sizes((heads,), (shared * group,))
    )


def _erase_unused(graph: fx.Graph, nodes: list[Any]) -> None:
    """Remove these nodes, and those that only they read, where nothing reads them any more."""
    for node in nodes:
        while isinstance(node, fx.Node) and node.op == "call_function" and not node.users:
            above = operand(node) if node.target in (*_COPIES, *_VIEWS) else None
            graph.erase_node(node)
            node = above
