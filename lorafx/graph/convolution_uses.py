"""Every use of a convolution's weight in a graph.

conv       y = conv(x, W) + b, W (N, C / groups, kernel...) as it is, or cast
unknown    anything else, with the reason
"""

from __future__ import annotations

import torch
from torch import fx

from lorafx.graph.weight_uses import SAME_VALUE, Use
from lorafx.op_arguments import bound
from lorafx.program.frame import fake_value

CONVOLUTION = torch.ops.aten.convolution.default


def convolution_uses(weight: fx.Node) -> list[Use]:
    """All uses of the weight held by `weight`."""
    found: list[Use] = []
    pending = [weight]
    while pending:
        held = pending.pop()
        for user in held.users:
            if isinstance(fake_value(user), (int, torch.SymInt)):
                continue  # of its sizes
            if user.target in SAME_VALUE:
                pending.append(user)
            elif user.target is CONVOLUTION and _is_kernel(user, held):
                call = bound(user)
                found.append(Use("conv", weight, user, x=call["input"], bias=call["bias"]))
            else:
                reason = f"no rule for {user.target}"
                found.append(Use("unknown", weight, user, reason=reason))
    return found


def _is_kernel(user: fx.Node, held: fx.Node) -> bool:
    """Whether `held` is what the convolution moves over its input, and nothing else of it."""
    call = bound(user)
    return call["weight"] is held and held not in (call["input"], call["bias"])
