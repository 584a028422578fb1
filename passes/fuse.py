"""A base linear and its site become one node: x is read once, y written once.

    y = mm(x, Wᵀ); y' = site(x, y, bank)   →   y' = fused_linear(x, W, b, bank)

Only if W enters the product unchanged (uncast, unexpanded) and y has no other reader.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.model.sites import Site
from lorafx.op_arguments import bound, in_order
from lorafx.program.context import COPIED, FUSED_OP, SITE_OP, Context, SiteState
from lorafx.program.frame import fake_value
from lorafx.program.plain_products import is_plain_product
from lorafx.program.weight_uses import Use
from lorafx.torch_internals.graph_parts import unset_fake_temporarily


@dataclass(frozen=True)
class Fuse:
    """A base product and its site become one node."""

    name: str = "fuse"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for node, (state, *_) in list(ctx.states.items()):
            if node.target is SITE_OP and is_plain_product(node, state):
                _fuse(ctx, node, state)
                edits += 1
        return edits


def _fuse(ctx: Context, node: fx.Node, state: SiteState) -> None:
    use: Use | None = state.use
    assert use is not None
    call = bound(node)
    base = {"weight": use.weight, "bias": use.bias}
    arguments = in_order(FUSED_OP, call, **base, transposed=state.site.eligible.transposed)
    with ctx.graph.inserting_before(node):
        if fake_value(call["x"]).dtype == fake_value(node).dtype:
            # Both are new contiguous tensors of equal sizes, and their arguments are checked.
            fused = ctx.graph.call_function(FUSED_OP, arguments)
            fused.meta["val"] = fake_value(node)
        else:
            fused = ctx.emit(FUSED_OP, *arguments)
    fused.meta.update({key: node.meta[key] for key in COPIED if key in node.meta})
    if _adds_own_bias(ctx, state.site, use) and _is_packed(ctx, state.site):
        # A mark has the group's packed weights as arguments.
        state.packed_weight, state.packed_bias = call["weight"], call["bias"]
    node.replace_all_uses_with(fused)
    ctx.merge([node], fused, "fused")


def _is_packed(ctx: Context, site: Site) -> bool:
    group, _ = ctx.program.home(site)
    packs = [packed for packed in ctx.program.packed if packed.group is group]
    with unset_fake_temporarily():  # passes run while AOTAutograd's fake mode is on
        return all(packed.holds(site) for packed in packs)


def _adds_own_bias(ctx: Context, site: Site, use: Use) -> bool:
    """Whether the product adds exactly the module's bias, which a packed bias holds too."""
    module_bias = getattr(site.module, "bias", None)
    if use.bias is None:
        return module_bias is None
    item = ctx.frame.by_node.get(use.bias)
    holder = None if item is None else item.holder
    return holder is not None and holder.tensor is module_bias
