"""Attention on a CPU reads keys and values once for all heads of queries that share them.

    y, … = attention(q, repeat(k), repeat(v), mask)  →  y = lorafx::attention(q, k, v, mask)

`repeat` is a copy of each head of keys for each head of queries in its group; without one, keys
have as many heads as queries. The call needs a generated kernel, and the statistics of torch's
operator have no reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.kernels.cpu.compiler import has_matrix_tiles
from lorafx.kernels.cpu.dense_attention import ATTENTION, AttentionForm, ready
from lorafx.op_arguments import bound, operand
from lorafx.passes.attend import is_transposed, only_result, same_sizes
from lorafx.program.context import Context
from lorafx.program.frame import fake_value

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
        edits = 0
        for attention in gm.graph.find_nodes(op="call_function", target=_BY_TORCH):
            result = only_result(attention)
            if result is None or not _has_known_order(fake_value(result)):
                continue
            call, query = bound(attention), fake_value(bound(attention)["query"])
            key, value, mask = call["key"], call["value"], call["attn_mask"]
            shared = _before_repeat(key), _before_repeat(value)
            if shared[0] is not None and shared[1] is not None:
                key, value = shared
            tensors = [
                query,
                *map(fake_value, (key, value)),
                None if mask is None else fake_value(mask),
            ]
            form = AttentionForm.of(*tensors)
            if form is None or call["dropout_p"] or not _is_quicker(form, query) or not ready(form):
                continue
            scale = query.shape[3] ** -0.5 if call["scale"] is None else call["scale"]
            masks = [] if mask is None else [mask]
            with gm.graph.inserting_before(attention):
                node = ctx.emit(
                    ATTENTION, call["query"], key, value, masks, call["is_causal"], scale
                )
                if not is_transposed(fake_value(result)):
                    node = ctx.emit(aten.clone.default, node, memory_format=torch.contiguous_format)
            node.meta = {**attention.meta, **node.meta}
            result.replace_all_uses_with(node)
            _erase_unused(gm.graph, [result, attention, call["key"], call["value"]])
            edits += 1
        return edits


def _has_known_order(result: torch.Tensor) -> bool:
    return is_transposed(result) or result.is_contiguous()


def _is_quicker(form: AttentionForm, query: torch.Tensor) -> bool:
    """Whether the kernel is known to take less time than torch's operator, which multiplies many
    queries in bfloat16 by the matrix tiles of a CPU that has them."""
    one = isinstance(query.shape[2], int) and query.shape[2] == 1
    return one or form.dtype != torch.bfloat16 or not has_matrix_tiles()


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """The (B, heads, N, D) of which `node`, (B, heads · G, N, D), has each head G times; None if it
    is no such copy."""
    expanded = None
    B, heads, N, D = fake_value(node).shape
    while node.target in _COPIES or node.target in _VIEWS:
        source = operand(node)
        before, after = fake_value(source).shape, fake_value(node).shape
        if node.target is aten.expand.default and not same_sizes(before, after):
            if expanded is not None or len(before) != len(after) or len(after) != 5:
                return None
            expanded = after
            repeated = isinstance(after[2], int) and same_sizes(
                after, (B, after[1], after[2], N, D)
            )
            if not repeated or not same_sizes(before, (B, after[1], 1, N, D)):
                return None
            if not same_sizes((heads,), (after[1] * after[2],)):
                return None
        elif node.target in _VIEWS[1:] and not same_sizes(before, after):
            return None
        node = source
        if expanded is not None and same_sizes(before, (B, expanded[1], N, D)):
            return node
    return None


def _erase_unused(graph: fx.Graph, nodes: list[Any]) -> None:
    """Remove these nodes, and those that only they read, where nothing reads them any more."""
    for node in nodes:
        while isinstance(node, fx.Node) and node.op == "call_function" and not node.users:
            above = operand(node) if node.target in (*_COPIES, *_VIEWS) else None
            graph.erase_node(node)
            node = above
