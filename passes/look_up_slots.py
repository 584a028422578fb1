"""A graph inside of a call looks the slots of its rows up when it is called.

    site(x, y, bank, handle)    →    site(x, y, bank, slots)

`handle` is what marks read, the slots of the batch. The rows of such a graph may be some of the
batch's, in another order. Where a graph begins with the call's arguments, its rows are the batch's;
slots per token are in the order of these arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.program.context import Context
from lorafx.program.inputs import FrameInput


@dataclass(frozen=True)
class LookUpSlots:
    """A graph inside of a call gets the slots of its own rows as an input."""

    name: str = "look_up_slots"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        frame = ctx.frame
        if frame.begins_call or frame.slots.per_token:
            return 0
        handle = next((node for node, item in frame.by_node.items() if item.kind == "slots"), None)
        if handle is None:
            return 0
        frame.by_node[handle] = FrameInput("state", "a handle of the slots")
        handle.replace_all_uses_with(ctx.slots_input((frame.positions[handle], 0)))
        return 1
