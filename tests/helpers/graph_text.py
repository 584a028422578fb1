"""Graphs as text: what a pass makes of a graph, for a reader to see.

    addmm = aten.addmm(w_bias, x, permute)
    site = lorafx.site(x, addmm, bank, slots, [0], [0], [6], 1)
    return site

`bank` stands for a bank's A, B, ranks and scales. Behind a node stands what it was planned to be.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import Any

import torch
from site_graphs import Finished
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from lorafx.program.context import Context

_BANK = re.compile(r"\ba(_\d+|), b\1, ranks\1, scales\1")
_WIDTH = 92


def shown(done: Finished, item: Any, first: tuple[Any, ...] = ()) -> str:
    """The graph before and after the pass `item`, with how many edits it made; `first` are the
    passes that run before it."""
    done.run(*first)
    before = text_of(done.gm, done.ctx)
    edits = done.run(item)
    made = f"{edits} edit" if edits == 1 else f"{edits} edits"
    return f"{before}\n\n{item.name}: {made}\n\n{text_of(done.gm, done.ctx)}\n"


def text_of(gm: fx.GraphModule, ctx: Context) -> str:
    """The calls of a graph, a line each, and below them those of the graphs that it calls."""
    names = _names(gm.graph, ctx)
    lines = [
        _line(node, ctx, names) for node in gm.graph.nodes if node.op in ("call_function", "output")
    ]
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(body := getattr(gm, node.target), fx.GraphModule):
            lines.append(f"{node.target}:")
            lines.extend(f"    {line}" for line in text_of(body, ctx).splitlines())
    return "\n".join(lines)


def _names(graph: fx.Graph, ctx: Context) -> dict[fx.Node, str]:
    """Calls go by their operator's name, with a number from the second on."""
    looked_up = {node: name.lower() for (*_, name), node in ctx.frame.extra_nodes.items()}
    names, seen = {}, Counter[str]()
    for node in graph.nodes:
        if node.op != "call_function":
            names[node] = looked_up.get(node, node.name)
            continue
        target = node.target
        name = target._schema.name if isinstance(target, OpOverload) else _text(target, {})
        name = name.rpartition("::")[2]
        names[node] = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
    return names


def _line(node: fx.Node, ctx: Context, names: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return f"return {', '.join(_text(value, names) for value in node.args[0])}"
    arguments = [_text(value, names) for value in node.args]
    for key, value in node.kwargs.items():
        named = "" if isinstance(node.target, HigherOrderOperator) else f"{key}="
        arguments.append(f"{named}{_text(value, names)}")
    called = _BANK.sub(r"bank\1", ", ".join(arguments))
    planned = {state.strategy.partition(" ")[0] for state in ctx.states.get(node, ())} - {""}
    comment = f"  # {', '.join(sorted(planned))}" if planned else ""
    line = f"{names[node]} = {_text(node.target, names)}({called}){comment}"
    return textwrap.fill(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(item, names) for item in value)}]"
    if isinstance(value, OpOverload):
        return str(value).removesuffix(".default")
    if isinstance(value, HigherOrderOperator):
        return value.name()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return value.__name__ if callable(value) else repr(value)
