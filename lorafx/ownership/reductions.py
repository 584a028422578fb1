"""Rules for operators that work over some dimensions, which must not be the owner's: reductions,
scans, sorts, norms, images and signals with shared weights, matrices of linear algebra.

    out[...] = f(x[..., :, ...]) over `dim`

Only a 1-D sort may run along the owner dimension: its values are x[p] for its indices p, so they
are owned through p.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import Flow, Rule, each_output, of_owned, wrap_all
from lorafx.ownership.labels import Label, Own
from lorafx.ownership.pointwise import in_front_of, not_over
from lorafx.ownership.symbolic import ONE

aten, prims = torch.ops.aten, torch.ops.prims


@of_owned
def reduced(node: fx.Node, flow: Flow, label: Own) -> Label:
    """Reductions over `dim` or `dims`; None and () mean all."""
    args = bound(node)
    n = len(flow.shape(operand(node)))
    dims = wrap_all(args.get("dim", args.get("dims")), n)
    if label.dim in dims:
        return each_output(node, flow.lost(node, f"reduced over {label}"))
    kept = args.get("keepdim", args.get("keepdims", False))
    return each_output(
        node, label if kept else label.at(label.dim - sum(d < label.dim for d in dims))
    )


@of_owned
def scanned(node: fx.Node, flow: Flow, label: Own) -> Label:
    """Softmax, cumulative sums, fft, top-k: work along `dim`, and keep all dimensions."""
    if label.dim in wrap_all(bound(node).get("dim"), len(flow.shape(operand(node)))):
        return each_output(node, flow.lost(node, f"works along {label}"))
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
}  # fmt: skip


def convolved(node: fx.Node, flow: Flow, dim: int) -> bool:
    """input (N, C, spatial...), weight (C_out, C_in / groups, kernel...): N survives, and so does a
    spatial dimension of kernel 1, stride 1 and no padding."""
    args, spatial = bound(node), dim - 2
    if spatial < 0 or args.get("transposed", False):
        return dim != 0
    kernel, stride, padding = flow.shape(args["weight"])[2:], args["stride"], args["padding"]
    alone = kernel[spatial] == ONE and flow.size(stride[spatial % len(stride)]) == ONE
    return not alone or flow.size(padding[spatial % len(padding)]) != 0


def batch_first(node: fx.Node, flow: Flow) -> Label:
    """Every tensor leads with the batch: grid sampling, affine grids."""
    label = flow.agree(node, [flow.label(arg) for arg in node.all_input_nodes])
    if isinstance(label, Own) and label.dim != 0:
        return each_output(node, flow.lost(node, f"works over {label}"))
    return each_output(node, label)


def distances(node: fx.Node, flow: Flow) -> Label:
    """cdist: (..., P, M) and (..., R, M) -> (..., P, R), leading dimensions broadcast."""
    args, n = bound(node), len(flow.shape(node))
    left, right = (flow.aligned(args[k], n) for k in ("x1", "x2"))
    if any(isinstance(label, Own) and label.dim == n - 1 for label in (left, right)):
        return flow.lost(node, "distances over the owner dimension")
    if isinstance(right, Own) and right.dim == n - 2:
        right = right.at(n - 1)
    return flow.agree(node, [left, right])


_ONE_D = (
    aten.avg_pool1d, aten.max_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d,
    aten.upsample_linear1d, aten.upsample_nearest1d, aten._upsample_nearest_exact1d,
    aten.max_pool1d_with_indices, aten.multinomial,
)  # fmt: skip
_TWO_D = (
    aten.avg_pool2d, aten.max_pool2d, aten.max_pool2d_with_indices, aten.adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.upsample_bilinear2d,
    aten.upsample_nearest2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d,
    aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.fractional_max_pool2d,
    aten.linalg_inv_ex, aten.linalg_inv, aten.inverse, aten.linalg_cholesky_ex,
    aten.linalg_cholesky, aten.linalg_qr, aten.linalg_eigh, aten._linalg_eigh, aten._linalg_svd,
    aten.linalg_svd, aten._linalg_det, aten.linalg_det, aten.linalg_lu_factor_ex,
    aten.linalg_matrix_exp, aten._linalg_slogdet, aten.cholesky_inverse,
    aten.geqrf, aten.linalg_eig, aten.linalg_lu, aten.linalg_ldl_factor_ex,
)  # fmt: skip
_THREE_D = (
    aten.avg_pool3d, aten.max_pool3d, aten.max_pool3d_with_indices, aten.adaptive_avg_pool3d,
    aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d, aten.upsample_trilinear3d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle, aten.im2col,
    aten.fractional_max_pool3d,
)  # fmt: skip

#: Of images, signals and matrices.
SPATIAL: dict[object, Rule] = {
    **dict.fromkeys((aten.convolution, aten._convolution), not_over(convolved)),
    **dict.fromkeys(_ONE_D, in_front_of(lambda node: 1)),
    **dict.fromkeys(_TWO_D, in_front_of(lambda node: 2)),
    **dict.fromkeys(_THREE_D, in_front_of(lambda node: 3)),
    aten.col2im: in_front_of(lambda node: 2),
    **dict.fromkeys(
        (
            aten.grid_sampler_2d, aten.grid_sampler_3d, aten.grid_sampler,
            aten._grid_sampler_2d_cpu_fallback, aten.affine_grid_generator,
        ),
        batch_first,
    ),
    **dict.fromkeys((aten.cdist, aten._cdist_forward), distances),
}  # fmt: skip
RULES |= SPATIAL

# Operators that a version may lack. Inductor's max pool works over as many trailing dimensions as
# its kernel has.
OPTIONAL: dict[tuple[str, str], Rule] = {
    ("prims", "_low_memory_max_pool_with_offsets"): in_front_of(
        lambda node: len(bound(node)["kernel_size"])
    ),
    **{
        ("aten", name): in_front_of(lambda node: 2)
        for name in ("linalg_matrix_sqrth", "linalg_polar", "_upsample_lanczos2d_aa")
    },
}
