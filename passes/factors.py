"""PEFT's arithmetic of one adapter becomes one op, wherever it is added.

    y + ((x Aᵀ) Bᵀ + b) · scale   →   factors(y + b · scale, x, A, B, scale)

Several active adapters are several ops, one on the result of the other. Where the sum is in a wider
dtype than y (float32 adapters on a bfloat16 base) and goes straight back to y's, one op adds in
float32 and rounds once; otherwise y is widened first, as PEFT does. A term that no kernel is
generated for is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lorafx.graph.factored import CAST, FactorSum, FactorTerm, factor_sum
from lorafx.graph.graph_nodes import module_path
from lorafx.graph.peft_context import FactorSite, PeftContext
from lorafx.kernels.factor_ops import FACTORS
from lorafx.kernels.factor_source import FactorSpec
from lorafx.program.frame import arguments_of, fake_value

aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    name: str = "factors"

    def run(self, gm: fx.GraphModule, ctx: PeftContext) -> int:
        edits = 0
        for node in list(gm.graph.nodes):
            found = factor_sum(node)
            if found is None:
                continue
            reason = _unsuited(found, ctx)
            if reason is not None:
                ctx.left.append(f"{module_path(node)}: {reason}")
            elif ctx.take_edit():
                _rewrite(gm.graph, ctx, found)
                edits += 1
        return edits


def _unsuited(found: FactorSum, ctx: PeftContext) -> str | None:
    """Why the term stays as PEFT wrote it, or None."""
    y, x = fake_value(found.y), fake_value(found.term.x)
    A, B = fake_value(found.term.A), fake_value(found.term.B)
    if not all(isinstance(size, int) for size in (*A.shape, *B.shape)):
        return "a factor's size is a symbol"
    if not (A.is_contiguous() and B.is_contiguous()):
        return "a factor is not contiguous"
    if A.dtype != B.dtype:
        return f"A is {A.dtype} and B {B.dtype}"
    if ctx.reference:
        return None
    if A.device.type != "cpu":
        return f"no kernel for factors as trained on {A.device.type}"
    spec = FactorSpec.of(y, x, A, B)
    return None if spec.supported() else f"no kernel is generated for {spec}"


def _rewrite(graph: fx.Graph, ctx: PeftContext, found: FactorSum) -> None:
    node, y, term = found.node, found.y, found.term
    dtype = fake_value(y).dtype
    casts = [user for user in node.users if _casts_to(user, dtype)]
    wide = fake_value(node).dtype
    direct = wide == dtype or len(casts) == len(node.users)
    with graph.inserting_before(node):
        if not direct:
            y = ctx.call(graph, CAST, (y, wide))
        scale = _scale(graph, ctx, term)
        if term.bias is not None:
            y = _with_bias(graph, ctx, y, term.bias, scale)
        op = FACTORS.tensor if isinstance(scale, fx.Node) else FACTORS.default
        new = ctx.call(graph, op, (y, term.x, term.A, term.B, scale))
        new.meta.update({key: value for key, value in node.meta.items() if key in _COPIED})
        ctx.sites[new] = _site(node, term)
        for view in found.views:
            new = ctx.call(graph, view.target, (new, *arguments_of(view)[1:]), **view.kwargs)
    for old in [node] if fake_value(new).dtype == wide else casts:
        old.replace_all_uses_with(new)


#: Where a node came from, kept for messages and dumps.
_COPIED = ("nn_module_stack", "stack_trace")


def _casts_to(user: fx.Node, dtype: torch.dtype) -> bool:
    return user.target is CAST and fake_value(user).dtype == dtype


def _scale(graph: fx.Graph, ctx: PeftContext, term: FactorTerm) -> fx.Node | float:
    """The term's scale as one number, or as a float32 node ()."""
    scale: fx.Node | float = term.scale
    for item in term.scales:
        scale = ctx.call(graph, aten.mul.Tensor, (item, scale))
    if isinstance(scale, fx.Node) and fake_value(scale).dtype != torch.float32:
        return ctx.call(graph, CAST, (scale, torch.float32))
    return scale


def _with_bias(
    graph: fx.Graph, ctx: PeftContext, y: fx.Node, bias: fx.Node, scale: fx.Node | float
) -> fx.Node:
    """y + b · scale in y's dtype."""
    bias = ctx.call(graph, aten.mul.Tensor, (bias, scale))
    total = ctx.call(graph, aten.add.Tensor, (y, bias))
    dtype = fake_value(y).dtype
    return total if fake_value(total).dtype == dtype else ctx.call(graph, CAST, (total, dtype))


def _site(node: fx.Node, term: FactorTerm) -> FactorSite:
    A, B = fake_value(term.A), fake_value(term.B)
    return FactorSite(module_path(node), int(A.shape[1]), int(B.shape[0]), int(A.shape[0]))
