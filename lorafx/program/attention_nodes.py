"""Nodes of torch's attention, and what takes their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE
from lorafx.op_arguments import index_of
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.graph_parts import statically_known_true

aten = torch.ops.aten

#: Operators that write into their argument `cache` -> their numbers of results.
CACHE_WRITES = {PAGED_CACHE: 2, PAGED_ATTENTION: 1}


def writes_caches(gm: fx.GraphModule) -> bool:
    """Whether a graph calls an operator that writes into a cache."""
    return any(gm.graph.find_nodes(op="call_function", target=op) for op in CACHE_WRITES)


def scale_of(call: dict[str, Any]) -> Any:
    """The scale of an attention with these arguments."""
    size = fake_value(call["query"]).shape[-1]
    return size**-0.5 if call["scale"] is None else call["scale"]


def take_place(ctx: Context, attention: fx.Node, result: fx.Node, op: Any, *arguments: Any) -> None:
    """Compute `result` of torch's `attention` by a call of `op`, whose result is transposed."""
    with ctx.graph.inserting_before(attention):
        node = ctx.emit(op, *arguments)
        if not is_transposed(fake_value(result)):  # torch's result for contiguous queries
            node = ctx.emit(aten.clone.default, node, memory_format=torch.contiguous_format)
    node.meta = {**attention.meta, **node.meta}
    result.replace_all_uses_with(node)


def only_result(attention: fx.Node) -> fx.Node | None:
    """The first result of an attention, if it is the only one that is read, and lies in memory as
    `take_place` can make it."""
    [*results] = attention.users
    if len(results) != 1 or index_of(results[0]) != 0:
        return None
    value = fake_value(results[0])
    return results[0] if is_transposed(value) or value.is_contiguous() else None


def is_transposed(result: torch.Tensor) -> bool:
    """Whether a result (1, H, T, D) has the memory order (1, T, H, D), like its replacement."""
    _, heads, tokens, size = result.shape
    _, head_stride, token_stride, last_stride = result.stride()
    return same_ints((head_stride, last_stride), (size, 1)) and (
        (isinstance(tokens, int) and tokens == 1) or same_ints((token_stride,), (heads * size,))
    )


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal."""
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )


def same_ints(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(isinstance(x, int) and x == y for x, y in zip(a, b, strict=True))
