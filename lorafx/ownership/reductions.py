"""Rules for reductions, scans, sorts and norms, which must not work along the owner dimension.

out[...] = f(x[..., :, ...]) over `dim`. Only a 1-D sort may run along the owner dimension: its
values are x[p] for its indices p, so they are owned through p.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import Flow, Rule, each_output, of_owned, wrap_all
from lorafx.ownership.labels import Label, Own
from lorafx.ownership.pointwise import in_front_of, not_over

aten, prims = torch.ops.aten, torch.ops.prims


@of_owned
def reduced(node: fx.Node, flow: Flow, label: Own) -> Label:
    """Reductions over `dim` or `dims`; None and () mean all."""
    args = bound(node)
    n = len(flow.shape(operand(node)))
    dims = wrap_all(args.get("dim", args.get("dims")), n)
    if label.dim in dims:
        return each_output(node, flow.lost(node, f"reduced over the owner dimension of {label}"))
    kept = args.get("keepdim", args.get("keepdims", False))
    return each_output(
        node, label if kept else label.at(label.dim - sum(d < label.dim for d in dims))
    )


@of_owned
def scanned(node: fx.Node, flow: Flow, label: Own) -> Label:
    """Softmax, cumulative sums, fft, top-k: work along `dim`, and keep all dimensions."""
    if label.dim in wrap_all(bound(node).get("dim"), len(flow.shape(operand(node)))):
        return each_output(node, flow.lost(node, f"works along the owner dimension of {label}"))
    return each_output(node, label)


@of_owned
def sorted_values(node: fx.Node, flow: Flow, label: Own) -> Label:
    """sort: (values, indices). A vector's values are x[p] with p the indices."""
    if len(flow.shape(operand(node))) != 1:
        return scanned(node, flow)
    lost = flow.lost(node, "the order of all requests' entries")
    if not isinstance(node.meta["val"], (tuple, list)):
        return lost  # argsort: the indices alone
    items = (user for user in node.users if user.target is operator.getitem)
    indices = next((item for item in items if index_of(item) == 1), None)
    if label.perm is not None or indices is None:
        return lost, lost
    return Own(0, label.rows, indices), lost


def normalised_shape(node: fx.Node) -> int:
    """layer_norm, rms_norm: the number of trailing dimensions that they average."""
    return len(bound(node)["normalized_shape"])


def batch_statistics(node: fx.Node, flow: Flow, dim: int) -> bool:
    """batch_norm in training: everything but the channels."""
    training = bound(node).get("training", bound(node).get("train", False))
    return bool(training) and dim != 1


def counted(node: fx.Node, flow: Flow) -> Label:
    """histc, bincount, unique, nonzero: counts and positions over all entries."""
    return each_output(node, flow.lost(node, "counts or positions over all requests' entries"))


RULES: dict[object, Rule] = {
    **dict.fromkeys(
        (aten.histc, aten.bincount, aten.nonzero, aten._unique2, aten.masked_select), counted
    ),
    **dict.fromkeys(
        (
            aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax,
            aten.argmin, aten.any, aten.all, aten.prod, aten.var, aten.std, aten.var_mean,
            aten.std_mean, aten.norm, aten.linalg_vector_norm, aten.logsumexp, aten.nansum,
            aten.nanmean, aten.count_nonzero, aten.median, aten.nanmedian, aten.aminmax,
            aten.kthvalue, aten.mode, prims.sum, prims.prod, prims.amax, prims.amin, prims.var,
            prims.xor_sum,
        ),
        reduced,
    ),
    **dict.fromkeys(
        (
            aten._softmax, aten.softmax, aten._log_softmax, aten.log_softmax, aten._safe_softmax,
            aten.cumsum, aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp, aten.topk,
            aten._fft_r2c, aten._fft_c2r, aten._fft_c2c, prims.fft_r2c, prims.fft_c2r,
            prims.fft_c2c, aten.cumulative_trapezoid,
        ),
        scanned,
    ),
    **dict.fromkeys((aten.sort, aten.argsort), sorted_values),
    **dict.fromkeys(
        (aten.native_layer_norm, aten.layer_norm, aten.rms_norm, aten._fused_rms_norm),
        in_front_of(normalised_shape),
    ),
    **dict.fromkeys(
        (aten.native_group_norm, aten.group_norm), not_over(lambda node, flow, dim: dim != 0)
    ),
    **dict.fromkeys(
        (
            aten.native_batch_norm, aten._native_batch_norm_legit, aten.batch_norm,
            aten._native_batch_norm_legit_functional, aten._batch_norm_with_update,
            aten._batch_norm_with_update_functional,
        ),
        not_over(batch_statistics, leading=False),
    ),
    **dict.fromkeys(
        (
            aten._native_batch_norm_legit_no_training, aten._batch_norm_no_update,
            aten.cudnn_batch_norm,
        ),
        not_over(lambda node, flow, dim: False, leading=False),
    ),
    aten.renorm: not_over(
        lambda node, flow, dim: dim not in wrap_all(bound(node)["dim"], len(flow.shape(node)))
    ),
}  # fmt: skip
