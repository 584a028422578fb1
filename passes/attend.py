"""Attention over a paged cache reads the keys of each token's own request.

    K, V = paged_cache(k, v, …, seen, mask);  y = attention(q, K, V, mask)
                                      →      y = paged_attention(q, k, v, …, seen, mask)

The mask must be an input of `paged_cache`, which torch may pad, cut back and expand on a GPU. Keys
and values may be repeated for the heads of a group, and must have no other readers. The step needs
a generated kernel.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE, PagedStep
from lorafx.kernels.triton.attention import is_generated
from lorafx.op_arguments import bound, in_order, index_of, operand
from lorafx.program.attention_nodes import (
    only_result,
    same_ints,
    same_sizes,
    scale_of,
    take_place,
)
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.graph_parts import OpOverload

aten = torch.ops.aten

#: torch's forms of a masked `scaled_dot_product_attention` without statistics, on CPUs and GPUs,
#: and the name of the mask.
_ATTENTION: dict[Any, str] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
}
#: Operators that keep the order of elements; those below do so if they keep the sizes.
_IN_ORDER = (
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
)
_IN_ORDER_IF_EQUAL = (aten.expand.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Attend:
    """Attention over a paged cache reads the keys of each token's own request."""

    name: str = "attend"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for target in _ATTENTION:
            for attention in gm.graph.find_nodes(op="call_function", target=target):
                replaced, result = _nodes_from_cache(attention), only_result(attention)
                if replaced is None or result is None or not _fits(replaced[-1], attention):
                    continue
                fixed = ctx.program.options.batch_invariant
                arguments = _arguments(bound(replaced[-1]), bound(attention), fixed=fixed)
                if not is_generated(PagedStep(*fx.map_arg(arguments, fake_value))):
                    continue
                take_place(ctx, attention, result, PAGED_ATTENTION, *arguments)
                for old in (result, attention, *replaced):
                    gm.graph.erase_node(old)
                edits += 1
        return edits


def _arguments(step: dict[str, Any], call: dict[str, Any], *, fixed: bool) -> tuple[Any, ...]:
    values = {"query": call["query"], "scale": scale_of(call), "cap": 0.0, "sinks": None}
    return in_order(PAGED_ATTENTION, step, **values, fixed=fixed)


def _nodes_from_cache(attention: fx.Node) -> list[fx.Node] | None:
    """The nodes from `attention` back to the cache's call; None if they have other readers."""
    call = bound(attention)
    keys, values = _chain_to_cache(call["key"]), _chain_to_cache(call["value"])
    if keys is None or values is None:
        return None
    between, cached = [*keys, *values], operand(keys[-1])
    sources = [(operand(chain[-1]), index_of(chain[-1])) for chain in (keys, values)]
    if sources != [(cached, 0), (cached, 1)] or call["query"] in between:
        return None
    if len(cached.users) != 2 or any(len(node.users) != 1 for node in between):
        return None
    return [*between, cached]


def _chain_to_cache(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from `node` (1, H, N, D) back to a paged cache's result (1, G, N, D), among which
    one `expand` may repeat the heads for the queries of a group; None if there are others."""
    chain, resized = [node], []
    while (last := chain[-1]).target is not operator.getitem:
        if last.target not in (*_IN_ORDER, *_IN_ORDER_IF_EQUAL):
            return None
        source = operand(last)
        before, after = fake_value(source).shape, fake_value(last).shape
        if last.target in _IN_ORDER_IF_EQUAL and not same_sizes(before, after):
            resized.append((last.target, before, after))
        chain.append(source)
    if operand(last).target is not PAGED_CACHE:
        return None
    (_, kv_heads, _, size), (_, heads, _, width) = (fake_value(end).shape for end in (last, node))
    if not resized:
        return chain if same_ints((heads, width), (kv_heads, size)) else None
    [(target, before, after), *further] = resized
    if further or target is not aten.expand.default or not len(before) == len(after) == 5:
        return None
    group = after[2]
    single, repeated = ((*shape[:3], shape[4]) for shape in (before, after))
    grouped = same_ints(single, (1, kv_heads, 1, size)) and same_ints(
        repeated, (1, kv_heads, group, size)
    )
    return chain if grouped and same_ints((heads, width), (kv_heads * group, size)) else None


def _fits(cached: fx.Node, attention: fx.Node) -> bool:
    """Whether `attention` takes the cache's mask, and no node in between reads the cache."""
    step, call = bound(cached), bound(attention)
    seen, mask = step["seen"], step["mask"]
    if seen is None or mask is None or _unpadded(call[_ATTENTION[attention.target]]) != mask:
        return False
    if call["dropout_p"] or call["is_causal"]:
        return False
    if any(cached < user < attention for user in step["cache"].users):
        return False
    query, key = fake_value(call["query"]), fake_value(step["key"])
    return query.dim() == 4 and query.shape[0] == 1 and same_ints(query.shape[3:], key.shape[3:])


def _unpadded(mask: fx.Node | None) -> fx.Node | None:
    """The mask before torch padded and sliced its last dimension for alignment, or expanded it."""
    while mask is not None and mask.op == "call_function":
        last = fake_value(mask).dim() - 1
        args = bound(mask) if isinstance(mask.target, OpOverload) else {}
        if mask.target is aten.constant_pad_nd.default:
            aligned = len(args["pad"]) == 2 and args["pad"][0] == 0
        elif mask.target is aten.slice.Tensor:
            aligned = args["dim"] in (last, -1) and args["start"] in (0, None) and args["step"] == 1
        else:
            aligned = mask.target in (aten.clone.default, aten.expand.default)
        if not aligned:
            return mask
        mask = operand(mask)
    return mask
