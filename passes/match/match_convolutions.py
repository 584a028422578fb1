"""Convolutions whose weight is used past their module's call: `F.conv2d(x, m.weight)`.

y = conv(x, W)   →   y' = conv_site(x, y, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from lorafx.graph.context import CONV_OP, Context, Refusal
from lorafx.graph.weight_uses import Use
from lorafx.model.convolutions import convolution_of
from lorafx.model.sites import Site
from lorafx.op_arguments import bound, in_order


def other_arithmetic(site: Site, use: Use) -> Refusal | None:
    """Why A cannot be convolved as this use convolves W, or None where it can.

    PEFT's A has the module's stride and padding, and zeros around x, whatever the use has."""
    module, call = convolution_of(site.module), bound(use.node)
    if call["transposed"] or call["groups"] != module.groups:
        reason = "its weight is used in a convolution of another kind than its own"
    elif any(step != 1 for step in call["dilation"]):
        reason = "its weight is used past its own call in a convolution with dilation"
    elif module.padding_mode != "zeros":
        reason = f"its weight is used past its own call, which has {module.padding_mode!r} padding"
    else:
        return None
    return Refusal((site,), "always", reason)


def insert_conv_site(graph: fx.Graph, ctx: Context, use: Use, values: Mapping[str, Any]) -> fx.Node:
    """The site's op on what the use computes; `values` are the bank's arguments, y and rows."""
    call = bound(use.node)
    padding = call["padding"]
    pads = [size for size in padding for _ in range(2)]
    kernel = [int(size) for size in use.weight.meta["val"].shape[2:]]
    window = {"kernel": kernel, "stride": call["stride"], "pads": pads}
    arguments = in_order(CONV_OP, values, x=use.x, addend=None, **window)
    return ctx.call(graph, CONV_OP, arguments)
