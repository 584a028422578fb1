"""Operators that write into a cache write into that input of the graph itself.

    y, p' = auto_functionalized_v2(op, x, _all_bases=[p]);  …;  p.copy_(p')      →      y = op(x, p)

AOTAutograd's functional graph would copy a whole cache for each layer. The rewrite is safe if the
input and its new values have no other readers.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.op_arguments import TRACED_WRITE, bound, in_order, index_of
from lorafx.program.attention_nodes import CACHE_WRITES
from lorafx.program.context import Context

_COPY = torch.ops.aten.copy_.default


@dataclass(frozen=True)
class WriteInPlace:
    """Operators that write into a cache write into that input itself."""

    name: str = "write_in_place"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for cache in gm.graph.find_nodes(op="placeholder"):
            chain, copies = _writes_into(cache)
            if not chain:
                continue
            for node in chain:
                _write_in_place(node, cache)
            for node in copies:
                gm.graph.erase_node(node)
            edits += len(chain)
        return edits


def _writes_into(cache: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Successive calls that write into `cache`, and copies back; empty if it has other readers."""
    chain: list[fx.Node] = []
    copies: list[fx.Node] = []
    base = cache
    while True:
        users = [user for user in base.users if not _copies_into(user, cache)]
        copies += [user for user in base.users if _copies_into(user, cache)]
        if not users:
            return (chain, list(dict.fromkeys(copies))) if chain and copies else ([], [])
        following = users[0]
        if len(users) > 1 or not _writes(following, base):
            return [], []
        chain.append(following)
        results = CACHE_WRITES[_called(following)]
        after = [user for user in following.users if index_of(user) == results]
        if len(after) != 1:
            return [], []
        base = after[0]


def _called(node: fx.Node) -> Any:
    return node.args[0]


def _copies_into(node: fx.Node, cache: fx.Node) -> bool:
    return node.target is _COPY and bound(node)["self"] is cache and not node.users


def _writes(node: fx.Node, base: fx.Node) -> bool:
    """Whether `node` wraps an operator that writes into all of `base`."""
    if node.target is not TRACED_WRITE or _called(node) not in CACHE_WRITES:
        return False
    bases: Any = node.kwargs.get("_all_bases", ())
    # A view would have further arguments.
    view = {name: value for name, value in node.kwargs.items() if name.startswith("_cache_")}
    return view == {"_cache_base_index": 0} and len(bases) == 1 and bases[0] is base


def _write_in_place(node: fx.Node, cache: fx.Node) -> None:
    op = _called(node)
    results = CACHE_WRITES[op]
    arguments = {name: value for name, value in node.kwargs.items() if not name.startswith("_")}
    graph = node.graph
    with graph.inserting_before(node):
        call = graph.call_function(op, in_order(op, arguments, cache=cache))
    values = node.meta["val"][:results]
    call.meta = {**node.meta, "val": values[0] if results == 1 else tuple(values)}
    call.meta.pop("eager_input_vals", None)  # the inputs of the functional call
    for user in list(node.users):
        if user.target is operator.getitem and (results == 1 or index_of(user) == results):
            user.replace_all_uses_with(call if index_of(user) == 0 else cache)
            graph.erase_node(user)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
