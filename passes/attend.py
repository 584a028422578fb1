"""Attention over a paged cache reads the keys of one request after the other.

    K, V = paged_cache(k, v, …, seen, mask);  y = attention(q, K, V, mask)
                                      →      y = paged_attention(q, k, v, …, seen, mask)

The mask of a step hides the keys of all other requests from a token. It is known to be the step's
where attention takes the very input that the cache was handed as its mask, on a GPU padded, cut
back and expanded, as its kernels need it to lie. Keys and values may be repeated for the heads of a
group. Where anything else reads them, what comes of the mask, or of the statistics of attention,
where torch has taken attention apart, and where no kernel is generated, the graph is left as it is.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.graph.context import Context
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PagedStep
from lorafx.kernels.ops.paged_cache import PAGED_CACHE
from lorafx.kernels.triton.triton_attention import is_generated
from lorafx.op_arguments import bound, in_order
from lorafx.program.frame import fake_value

aten = torch.ops.aten

#: What torch makes of `scaled_dot_product_attention` with a mask where no statistics are asked for,
#: on a CPU and on GPUs, and the name of the mask.
_ATTENTION: dict[Any, str] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
}
_COPIES = (aten.clone.default,)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class Attend:
    """Attention over a paged cache reads the keys of one request after the other."""

    name: str = "attend"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for cached in gm.graph.find_nodes(op="call_function", target=PAGED_CACHE):
            found = _attention_of(cached)
            if found is None:
                continue
            attention, result, between = found
            call = _call(bound(cached), bound(attention))
            if not _fits(cached, found) or not is_generated(PagedStep(*fx.map_arg(call, fake_value))):
                continue
            with gm.graph.inserting_before(attention):
                node = ctx.call(gm.graph, PAGED_ATTENTION, call)
                if not _transposed(fake_value(result)):  # torch says so of contiguous queries
                    node = ctx.call(
                        gm.graph, aten.clone.default, (node,), memory_format=torch.contiguous_format
                    )
            node.meta = {**attention.meta, **node.meta}
            result.replace_all_uses_with(node)
            for old in (result, attention, *reversed(between), cached):
                gm.graph.erase_node(old)
            edits += 1
        return edits


def _call(given: dict[str, Any], asked: dict[str, Any]) -> tuple[Any, ...]:
    """What `lorafx::paged_attention` takes for these of the cache and of attention."""
    scale = asked["scale"]
    if scale is None:
        scale = fake_value(asked["query"]).shape[-1] ** -0.5
    return in_order(
        PAGED_ATTENTION, given, query=asked["query"], scale=scale, cap=0.0, sinks=None
    )


def _attention_of(cached: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """The attention that reads what `cached` returns, its result, and the nodes between, in their
    order; None where something else reads any of these."""
    found: dict[str, fx.Node] = {}
    between: list[fx.Node] = []
    for item in cached.users:
        name = "key" if item.args[1] == 0 else "value"
        chain = _repeated(item)
        if chain is None or name in found:
            return None
        between += chain
        found[name] = next(iter(chain[-1].users))
    if len(found) < 2 or found["key"] is not found["value"]:
        return None
    attention = found["key"]
    if attention.target not in _ATTENTION:
        return None
    asked = bound(attention)
    ends = [node for node in between if attention in node.users]
    if {asked["key"], asked["value"]} != set(ends) or asked["query"] in ends:
        return None
    if _origin(asked["key"]) != (cached, 0) or _origin(asked["value"]) != (cached, 1):
        return None
    [*results] = attention.users
    if len(results) != 1 or results[0].args[1] != 0:
        return None
    return attention, results[0], between


def _repeated(item: fx.Node) -> list[fx.Node] | None:
    """`item` (1, G, N, D) and what repeats its heads for the queries of a group, (1, H, N, D), up
    to the node that attention takes; None where it is anything else."""
    _, heads, _, size = fake_value(item).shape
    chain, steps = [item], ["item"]
    while True:
        node = chain[-1]
        if len(node.users) != 1:
            return None
        following = next(iter(node.users))
        step = _step(following, node)
        if step is None:
            break
        chain.append(following)
        steps += [step] if step else []
    if len(steps) == 1:
        return chain
    if steps != ["item", "unsqueeze", "expand", "view"]:
        return None
    *_, (_, each, group, _, last) = (
        fake_value(node).shape for node in chain if fake_value(node).dim() == 5
    )
    repeated = fake_value(chain[-1]).shape
    whole = _same((each, last, repeated[1], repeated[3]), (heads, size, heads * group, size))
    return chain if whole else None


def _step(node: fx.Node, source: fx.Node) -> str | None:
    """What `node` does to `source` on the way to more heads: "" for nothing; None where it is no
    part of that."""
    if node.op != "call_function" or node.args[0] is not source:
        return None
    args = bound(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target in _COPIES:
        return ""
    if node.target is aten.slice.Tensor:
        whole = args["start"] in (0, None) and args["end"] in (None, sys.maxsize)
        return "" if whole and args["step"] == 1 else None
    if node.target is aten.unsqueeze.default:
        return "unsqueeze" if args["dim"] == 2 else None
    if node.target is aten.expand.default:
        return "expand"
    if node.target in _VIEWS:
        return "view"
    return None


def _origin(node: fx.Node) -> tuple[fx.Node, int]:
    """The call whose result `node` is made of, and which of its results."""
    while node.target is not operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node.args[0], node.args[1]  # type: ignore[return-value]


def _fits(cached: fx.Node, found: tuple[fx.Node, fx.Node, list[fx.Node]]) -> bool:
    """Whether this attention is what a generated kernel computes, and nothing between it and the
    cache sees what is written."""
    attention, result, _ = found
    given, asked = bound(cached), bound(attention)
    seen, mask = given["seen"], given["mask"]
    if seen is None or mask is None or _unpadded(asked[_ATTENTION[attention.target]]) != mask:
        return False
    if asked["dropout_p"] or asked["is_causal"]:
        return False
    others = {user for user in given["cache"].users if user is not cached}
    if any(node in others for node in _between(cached, attention)):
        return False
    query, key = fake_value(asked["query"]), fake_value(given["key"])
    if query.dim() != 4 or query.shape[0] != 1 or not _same(query.shape[3:], key.shape[3:]):
        return False
    laid = fake_value(result)
    return _transposed(laid) or laid.is_contiguous()


def _unpadded(mask: fx.Node | None) -> fx.Node | None:
    """What the mask that attention takes was before torch aligned it: padded at the end of its last
    dimension, cut off there, copied, expanded to heads that it is broadcast to anyway."""
    while mask is not None and mask.op == "call_function":
        last = fake_value(mask).dim() - 1
        args = bound(mask) if isinstance(mask.target, torch._ops.OpOverload) else {}
        if mask.target is aten.constant_pad_nd.default:
            aligned = len(args["pad"]) == 2 and args["pad"][0] == 0
        elif mask.target is aten.slice.Tensor:
            aligned = args["dim"] in (last, -1) and args["start"] in (0, None) and args["step"] == 1
        else:
            aligned = mask.target in (*_COPIES, aten.expand.default)
        if not aligned:
            return mask
        mask = mask.all_input_nodes[0]
    return mask


def _transposed(result: torch.Tensor) -> bool:
    """Whether a result (1, H, T, D) lies as (1, T, H, D), as what takes its place does."""
    _, heads, tokens, size = result.shape
    _, of_heads, of_tokens, of_size = result.stride()
    return _same((of_heads, of_size), (size, 1)) and (
        (isinstance(tokens, int) and tokens == 1) or _same((of_tokens,), (heads * size,))
    )


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found = []
    node = first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Equal sizes that are numbers, not symbols."""
    return all(isinstance(a, int) and a == b for a, b in zip(one, other, strict=True))
