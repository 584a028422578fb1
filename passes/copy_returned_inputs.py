"""Results that Inductor's rewrites have made inputs, or views of inputs, are copied.

    return n    with n an input, where AOTAutograd knew n + 0    →    return clone(n)

AOTAutograd overwrites inputs after the graph, and what it knew to be a value of its own would be
overwritten with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.op_arguments import base_of, operand
from lorafx.program.context import Context
from lorafx.program.frame import fake_value


@dataclass(frozen=True)
class CopyReturnedInputs:
    """Results that Inductor has made inputs are copied, since inputs are overwritten afterwards."""

    name: str = "copy_returned_inputs"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        output = gm.graph.output_node()
        items: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        edits = 0
        for place, before in enumerate(ctx.memory):
            base = base_of(items[place])
            became_input = isinstance(base, fx.Node) and base.op == "placeholder"
            if not became_input or base is before or not isinstance(fake_value(base), Tensor):
                continue
            items[place] = _copied(output, items[place], base)
            edits += 1
        if edits:
            output.args = (tuple(items),)
        return edits


def _copied(output: fx.Node, item: fx.Node, base: fx.Node) -> fx.Node:
    """`item`, a view of `base` or that itself, as a view of a copy."""
    user = item if item is not base else output
    while user is not output and operand(user) is not base:
        user = operand(user)
    with output.graph.inserting_before(user):
        copy = output.graph.call_function(torch.ops.aten.clone.default, (base,))
    copy.meta.update(val=fake_value(base).clone())
    if user is output:
        return copy
    user.replace_input_with(base, copy)
    return item
