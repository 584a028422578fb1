"""Rules for operators on batches: of matrices, of images, of sequences.

    out[b, ...] = f(a[b, ...], c[b, ...], ...)     b: one or several leading dimensions

Each operand has a known number of trailing dimensions that `f` works over. The leading ones are
broadcast, as in torch.linalg, and lead each result. Recurrent layers have the batch in dimension 1
of (time, batch, features) and in the last but one of their states.
"""

from __future__ import annotations

import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership.flow import Flow, Rule, each_output, outputs, wrap
from lorafx.ownership.labels import Label, Own, Single
from lorafx.ownership.symbolic import equal, is_multiple
from lorafx.torch_internals.graph_parts import OpOverload

aten, prims = torch.ops.aten, torch.ops.prims


def tensors_of(node: fx.Node) -> list[fx.Node | None]:
    """The tensor arguments of a call in the order of its schema; None for those left out."""
    assert isinstance(node.target, OpOverload)
    args = bound(node)
    kinds = [(item.name, str(item.type)) for item in node.target._schema.arguments]
    return [args.get(name) for name, kind in kinds if kind in ("Tensor", "Optional[Tensor]")]


def leading(node: fx.Node, flow: Flow, trailing: list[int]) -> Label:
    """The label of each result, from the number of trailing dimensions of each tensor argument."""
    operands = [
        (arg, len(flow.shape(arg)) - count)
        for arg, count in zip(tensors_of(node), trailing, strict=False)
        if arg is not None
    ]
    most = max(lead for _, lead in operands)
    labels: list[Single] = []
    for arg, lead in operands:
        label = flow.label(arg)
        if isinstance(label, Own):
            if label.dim >= lead:
                return each_output(node, flow.lost(node, f"works over the dimension of {label}"))
            label = label.at(label.dim + most - lead)
        labels.append(label)
    common = flow.agree(node, labels)
    if not isinstance(common, Own):
        return each_output(node, common)
    sizes = [
        flow.shape(arg)[common.dim - most + lead]
        for arg, lead in operands
        if isinstance(flow.label(arg), Own)
    ]
    lost = flow.lost(node, f"a result without the dimension of {common}")
    found: list[Single] = []
    for value in outputs(node):
        shape = flow.sizes.shape(value) if isinstance(value, torch.Tensor) else ()
        leads = len(shape) > common.dim and all(equal(shape[common.dim], size) for size in sizes)
        found.append(common if leads else lost)
    return tuple(found) if isinstance(node.meta.get("val"), (tuple, list)) else found[0]


def batched(*trailing: int) -> Rule:
    """The rule of an operator whose tensor arguments have so many trailing dimensions; further
    ones are as the last."""

    def rule(node: fx.Node, flow: Flow) -> Label:
        count = len(tensors_of(node))
        return leading(node, flow, [*trailing, *trailing[-1:] * count][:count])

    return rule


def solved(node: fx.Node, flow: Flow) -> Label:
    """Systems of A (..., n, n) and B (..., n, k), or B (..., n) with one dimension less than A."""
    left, right = tensors_of(node)[:2]
    a, b = flow.shape(left), flow.shape(right)
    vector = len(b) + 1 == len(a)
    if vector and flow.label(right) is not None and not all(map(equal, a[:-1], b)):
        return each_output(node, flow.lost(node, "vectors or matrices are solved for"))
    return leading(node, flow, [2, 1 if vector else 2])


def crossed(node: fx.Node, flow: Flow) -> Label:
    """cross(self, other, dim) of vectors along `dim`."""
    n = len(flow.shape(node))
    label = flow.broadcast(node, node.all_input_nodes, n)
    if isinstance(label, Own) and label.dim == wrap(bound(node)["dim"], n):
        return flow.lost(node, f"vectors along {label}")
    return label


def trilinear(node: fx.Node, flow: Flow) -> Label:
    """Σ over `sumdim` of i1·i2·i3, each with dimensions of size one at `expand`."""
    args = bound(node)
    summed = set(args["sumdim"])
    labels: list[Single] = []
    for name, expand in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        label = flow.label(args[name])
        if isinstance(label, Own):
            n = len(flow.shape(args[name])) + len(args[expand])
            dim = [d for d in range(n) if d not in args[expand]][label.dim]
            if dim in summed:
                return flow.lost(node, f"summed over {label}")
            label = label.at(dim - sum(d < dim for d in summed))
        labels.append(label)
    return flow.agree(node, labels)


def losses(node: fx.Node, flow: Flow) -> Label:
    """nll_loss of (N, C, ...) and targets (N, ...), for each entry."""
    args = bound(node)
    label = flow.agree(node, [flow.label(args[name]) for name in ("self", "target")])
    if not isinstance(label, Own):
        return each_output(node, label)
    if label.dim != 0 or args["reduction"] != 0 or flow.label(args["weight"]) is not None:
        return each_output(node, flow.lost(node, "a loss of several requests"))
    return label, *(flow.lost(node, "weights of several requests") for _ in outputs(node)[1:])


def bags(node: fx.Node, flow: Flow) -> Label:
    """embedding_bag(weight, indices (N,), offsets): bags of equally many indices, each of one
    request."""
    args = bound(node)
    label, offsets = flow.label(args["indices"]), args["offsets"]
    shared = flow.agree(node, [flow.label(args["weight"]), flow.label(offsets)])
    weights = flow.label(args.get("per_sample_weights"))
    lost = flow.lost(node, "bags of which it is not known whose indices they hold")
    size = stride_of(offsets, flow)
    if (
        not isinstance(label, Own)
        or shared is not None
        or weights not in (None, label)
        or label.perm is not None
        or size is None
        or not is_multiple(label.rows, size)
        or not equal(flow.shape(offsets)[0] * size, flow.shape(args["indices"])[0])
    ):
        return each_output(node, lost)
    return Own(0, label.rows / size), *(lost for _ in outputs(node)[1:])


def stride_of(offsets: fx.Node, flow: Flow) -> object:
    """s of offsets 0, s, 2·s, ...; None if they are not known to be such."""
    if getattr(offsets.target, "overloadpacket", None) not in (aten.arange, prims.iota):
        return None
    args = bound(offsets)
    step = flow.size(args.get("step", 1))
    return step if flow.size(args.get("start", 0)) == 0 and step != 0 else None


def diagonals(node: fx.Node, flow: Flow) -> Label:
    """diag_embed(self (..., n), offset, dim1, dim2): the other dimensions keep their order."""
    label, n = flow.label(operand(node)), len(flow.shape(node))
    if not isinstance(label, Own):
        return label
    args = bound(node)
    planes = {wrap(args[name], n) for name in ("dim1", "dim2")}
    if label.dim == n - 2:
        return flow.lost(node, f"a diagonal along {label}")
    return label.at([d for d in range(n) if d not in planes][label.dim])


def recurrent(node: fx.Node, flow: Flow) -> Label:
    """One layer in one direction, or all of them: input (T, B, F), states (..., B, H) -> output
    (T, B, H), states. Packed sequences have `batch_sizes`."""
    args, values = bound(node), outputs(node)
    x = args["input"]
    states = [args.get(name) for name in ("hx_", "cx_", "hx", "cx")]
    shared = [arg for arg in node.all_input_nodes if arg is not x and arg not in states]
    if args["batch_sizes"] or any(flow.label(arg) is not None for arg in shared):
        return each_output(node, flow.lost(node, "packed sequences, or weights of requests"))
    batch = 0 if args["batch_first"] and "hx" in args else 1  # mkldnn's layers are transposed
    labels: list[Single] = []
    for arg, dim in ((x, batch), *((arg, len(flow.shape(arg)) - 2) for arg in states if arg)):
        label = flow.label(arg)
        if isinstance(label, Own):
            if label.dim != dim:
                return each_output(node, flow.lost(node, f"works over the dimension of {label}"))
            label = label.at(0)
        labels.append(label)
    common = flow.agree(node, labels)
    if not isinstance(common, Own):
        return each_output(node, common)
    dims = [batch, *(len(flow.sizes.shape(value)) - 2 for value in values[1:3])]  # type: ignore[arg-type]
    lost = flow.lost(node, "a workspace")
    return (*(common.at(dim) for dim in dims), *(lost for _ in values[3:]))


RULES: dict[object, Rule] = {
    **dict.fromkeys((aten._linalg_solve_ex, aten.linalg_lstsq), solved),
    **dict.fromkeys(
        (
            aten.linalg_solve_triangular, aten.cholesky_solve, aten.triangular_solve,
            aten.max_unpool2d,
        ),
        batched(2),
    ),
    **dict.fromkeys((aten.linalg_ldl_solve, aten.linalg_lu_solve), batched(2, 1, 2)),
    **dict.fromkeys((aten.lu_unpack, aten.linalg_householder_product), batched(2, 1)),
    aten.ormqr: batched(2, 1, 2),
    aten.linalg_pinv: batched(2, 0),
    aten.max_unpool3d: batched(3),
    **dict.fromkeys((aten._thnn_fused_lstm_cell, aten._thnn_fused_gru_cell), batched(1)),
    aten.linalg_cross: crossed,
    aten._trilinear: trilinear,
    **dict.fromkeys((aten.nll_loss_forward, aten.nll_loss2d_forward), losses),
    **dict.fromkeys((aten._embedding_bag_forward_only, aten._embedding_bag), bags),
    aten.diag_embed: diagonals,
    **dict.fromkeys((aten.mkldnn_rnn_layer, aten._cudnn_rnn), recurrent),
}  # fmt: skip
