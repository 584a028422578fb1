"""Products with routed experts, fused with their deltas.

    y = grouped_mm(x, W, offs)
    y' = expert_site(x, y, bank, e)   →   y' = fused_experts(x, W, offs, bank, e)

The node keeps the name of the base's operator, for plans that use it for the product.
"""

from __future__ import annotations

import torch
from torch import fx

import lorafx.kernels.ops.expert_ops  # noqa: F401  defines the op
from lorafx.op_arguments import bound, in_order
from lorafx.program.context import EXPERT_OP, Context
from lorafx.program.expert_uses import GROUPED, grouped, is_grouped
from lorafx.program.frame import fake_value

aten = torch.ops.aten
FUSED_EXPERTS = torch.ops.lorafx.fused_experts.default
#: A fused node's original operator.
_PRODUCT = "lorafx_product"
#: Origins of a node, for messages and dumps.
_COPIED = ("nn_module_stack", "stack_trace")


def fuse_experts(ctx: Context, node: fx.Node) -> bool:
    """Fuse an expert_site with the grouped product of its rows."""
    if node.target is not EXPERT_OP:
        return False
    call = bound(node)
    x, y, experts = call["x"], call["y"], call["experts"]
    if not is_grouped(y) or len(y.users) != 1:
        return False
    own_x, right, offs, alone = grouped(y)
    turned = bound(right) if right.target is aten.permute.default else {}
    swapped = bool(turned) and list(turned["dims"]) == [0, 2, 1]
    weight = turned["self"] if swapped else right
    search = bound(experts) if experts.target is aten.searchsorted.Tensor else {}
    by_ends = search.get("sorted_sequence") is offs
    dtypes = {fake_value(item).dtype for item in (x, weight, y)}
    plain = weight.op == "placeholder" and len(dtypes) == 1 and alone
    if own_x is not x or not by_ends or not plain or not ctx.take_edit():
        return False
    base = {"weight": weight, "offs": offs, "transposed": not swapped}
    with ctx.graph.inserting_before(node):
        fused = ctx.emit(FUSED_EXPERTS, *in_order(FUSED_EXPERTS, call, **base))
    fused.meta.update({key: y.meta[key] for key in _COPIED if key in y.meta})
    fused.meta[_PRODUCT] = y.target
    node.replace_all_uses_with(fused)
    ctx.merge([node], fused, "fused")
    return True


def product(ctx: Context, node: fx.Node) -> fx.Node:
    """The original grouped product (M, N) of a fused `node`."""
    call = bound(node)
    right = call["weight"]
    if not call["transposed"]:
        right = ctx.emit(aten.permute.default, right, [0, 2, 1])
    return ctx.emit(node.meta[_PRODUCT], call["x"], right, call["offs"])


def loops_on_host(node: fx.Node) -> bool:
    """Whether that product loops over experts on the host, as all but torch's do."""
    return node.meta[_PRODUCT] not in GROUPED
