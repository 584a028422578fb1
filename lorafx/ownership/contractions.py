"""Rules for contractions: the owner's letter must survive from the operands into the output.

In an einsum such as `nk,km->nm` an owner dimension is a letter; summing over it mixes requests. All
owned operands must have the same letter and map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.kernels.cpu.stored_grouped_mm import STORED_GROUPED_MM
from lorafx.op_arguments import bound
from lorafx.ownership.flow import Flow, Rule, each_output, outputs
from lorafx.ownership.labels import Label, Own, Single
from lorafx.ownership.symbolic import equal

aten = torch.ops.aten

#: The names of a product's addend ("" for none), left and right operand.
PRODUCTS: dict[Any, tuple[str, str, str]] = {
    aten.mm: ("", "self", "mat2"),
    aten.bmm: ("", "self", "mat2"),
    aten.addmm: ("self", "mat1", "mat2"),
    aten.baddbmm: ("self", "batch1", "batch2"),
}


def lettered(
    node: fx.Node, flow: Flow, operands: list[tuple[object, str]], out: str, *bias: object
) -> Single:
    """The label of `out` from operands with letters; `bias` is broadcast to the output."""
    labels: list[Single] = []
    for arg, letters in operands:
        label = flow.label(arg)
        if isinstance(label, Own):
            letter = letters[label.dim]
            if letter not in out:
                return flow.lost(node, f"contracted over {label}")
            label = label.at(out.index(letter))
        labels.append(label)
    return flow.agree(node, labels + [flow.aligned(arg, len(out)) for arg in bias])


def einsum(operands: dict[str, str], out: str, bias: str | None = None) -> Rule:
    """The rule of a contraction of named schema arguments."""

    def rule(node: fx.Node, flow: Flow) -> Label:
        args = bound(node)
        pairs = [(args[name], letters) for name, letters in operands.items()]
        extra = [args[bias]] if bias is not None else []
        return lettered(node, flow, pairs, out, *extra)

    return rule


def matmul(node: fx.Node, flow: Flow) -> Label:
    """matmul and linear before decomposition: batch dimensions broadcast, the last contracts."""
    args = bound(node)
    a, b = args.get("self", args.get("input")), args.get("other", args.get("weight"))
    right = flow.label(b)
    left = flow.label(a)
    n = len(flow.shape(node))
    if len(flow.shape(a)) < 2 or len(flow.shape(b)) < 2:
        return (
            flow.lost(node, "a vector product") if left is not None or right is not None else None
        )
    if isinstance(left, Own) and left.dim == len(flow.shape(a)) - 1:
        return flow.lost(node, "contracted over the owner dimension")
    batch_dims = len(flow.shape(b)) - 2
    if isinstance(right, Own) and right.dim >= batch_dims:
        return flow.lost(node, "the right operand's matrix is owned")
    bias = args.get("bias")
    return flow.agree(node, [flow.aligned(a, n), flow.aligned(b, n), flow.aligned(bias, n)])


def grouped(node: fx.Node, flow: Flow) -> Label:
    """Rows (N, K) by expert weights (E, K, M): each row keeps its place for any `offs`."""
    args = bound(node)
    rows = args.get("self", args.get("input", args.get("mat_a")))
    weight = args.get("mat2", args.get("weight", args.get("mat_b")))
    parts = weight if isinstance(weight, (list, tuple)) else [weight]  # of one that is stored
    label, shared = flow.label(rows), [flow.label(part) for part in (*parts, args.get("bias"))]
    fits = len(flow.shape(rows)) == 2 and (parts is weight or len(flow.shape(weight)) == 3)
    if any(other is not None for other in shared):
        return flow.lost(node, "expert weights depend on requests")
    if isinstance(label, Own) and (label.dim != 0 or not fits):
        return flow.lost(node, f"groups over {label}")
    return label


def attention(node: fx.Node, flow: Flow) -> Label:
    """Scaled dot product: q (b, h, q, d), k (b, h, k, d), v (b, h, k, e) -> (b, h, q, e).

    Heads carry an owner only if q, k and v have as many. Statistics begin with (b, h).
    """
    args = bound(node)
    mask = next((args[k] for k in ("attn_mask", "attn_bias") if args.get(k) is not None), None)
    query, key, value = args["query"], args["key"], args["value"]
    n = len(flow.shape(query))
    if n != 4:
        return each_output(node, flow.lost(node, "attention that is not four-dimensional"))
    q, k, v = (flow.shape(t) for t in (query, key, value))
    kv_heads = "h" if equal(q[1], k[1]) and equal(k[1], v[1]) else "g"
    pairs: list[tuple[object, str]] = [
        (query, "bhqd"),
        (key, f"b{kv_heads}kd"),
        (value, f"b{kv_heads}ke"),
    ]
    if mask is not None:
        pairs.append((mask, "bhqk"[4 - len(flow.shape(mask)) :]))
    out = lettered(node, flow, pairs, "bhqe")
    values = outputs(node)
    if not isinstance(node.meta["val"], (tuple, list)):
        return out
    labels: list[Single] = [out]
    for other in values[1:]:
        shape = flow.sizes.shape(other) if isinstance(other, torch.Tensor) else ()
        kept = isinstance(out, Own) and out.dim < 2 and len(shape) > 2
        if isinstance(out, Own) and not (kept and equal(shape[out.dim], q[out.dim])):
            labels.append(flow.lost(node, "statistics of attention"))
        else:
            labels.append(out)
    return tuple(labels)


RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.mm, aten._int_mm), einsum({"self": "nk", "mat2": "km"}, "nm")),
    aten.bmm: einsum({"self": "bnk", "mat2": "bkm"}, "bnm"),
    aten.addmm: einsum({"mat1": "nk", "mat2": "km"}, "nm", "self"),
    aten._addmm_activation: einsum({"mat1": "nk", "mat2": "km"}, "nm", "self"),
    aten.baddbmm: einsum({"batch1": "bnk", "batch2": "bkm"}, "bnm", "self"),
    aten.addbmm: einsum({"batch1": "bnk", "batch2": "bkm"}, "nm", "self"),
    aten.mv: einsum({"self": "nk", "vec": "k"}, "n"),
    aten.addmv: einsum({"mat": "nk", "vec": "k"}, "n", "self"),
    aten.dot: einsum({"self": "k", "tensor": "k"}, ""),
    aten.vdot: einsum({"self": "k", "other": "k"}, ""),
    aten.outer: einsum({"self": "n", "vec2": "m"}, "nm"),
    aten.addr: einsum({"vec1": "n", "vec2": "m"}, "nm", "self"),
    aten._weight_int8pack_mm: einsum({"self": "nk", "mat2": "mk", "scales": "m"}, "nm"),
    **dict.fromkeys((aten.matmul, aten.linear), matmul),
    **dict.fromkeys(
        (aten._grouped_mm, GROUPED_MM.overloadpacket, STORED_GROUPED_MM.overloadpacket), grouped
    ),
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
            aten._scaled_dot_product_fused_attention_overrideable,
            aten._scaled_dot_product_attention_math,
            aten._scaled_dot_product_attention_math_for_mps, aten.scaled_dot_product_attention,
        ),
        attention,
    ),
}  # fmt: skip

# Operators of libraries that may not be loaded, by namespace and name.
OPTIONAL: dict[tuple[str, str], Rule] = {("transformers", "grouped_mm_fallback"): grouped}
