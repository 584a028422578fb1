"""Rules for operators of images and signals (batch, channels, spatial...) with shared weights, and
of linear algebra on batches of matrices. An owner before the worked dimensions survives."""

from __future__ import annotations

import torch
from torch import fx

from lorafx.op_arguments import bound
from lorafx.ownership.flow import Flow, Rule, each_output
from lorafx.ownership.labels import Label, Own
from lorafx.ownership.pointwise import in_front_of, not_over
from lorafx.ownership.symbolic import ONE

aten, prims = torch.ops.aten, torch.ops.prims


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
        return each_output(node, flow.lost(node, f"works over the owner dimension of {label}"))
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


def solved(node: fx.Node, flow: Flow) -> Label:
    """Linear systems: matrices in the last two dimensions, the leading ones broadcast."""
    n = len(flow.shape(node))
    label = flow.broadcast(node, node.all_input_nodes, n)
    if isinstance(label, Own) and label.dim >= n - 2:
        return flow.lost(node, f"solves over the owner dimension of {label}")
    return label


_ONE_D = (
    aten.avg_pool1d, aten.max_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d,
    aten.upsample_linear1d, aten.upsample_nearest1d, aten._upsample_nearest_exact1d,
    aten.max_pool1d_with_indices,
)  # fmt: skip
_TWO_D = (
    aten.avg_pool2d, aten.max_pool2d, aten.max_pool2d_with_indices, aten.adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.upsample_bilinear2d,
    aten.upsample_nearest2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d,
    aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.fractional_max_pool2d,
    aten.linalg_inv_ex, aten.linalg_inv, aten.inverse, aten.linalg_cholesky_ex,
    aten.linalg_cholesky, aten.linalg_qr, aten.linalg_eigh, aten._linalg_eigh, aten._linalg_svd,
    aten.linalg_svd, aten._linalg_det, aten.linalg_det, aten.linalg_lu_factor_ex,
    aten.linalg_matrix_exp, aten._linalg_slogdet,
)  # fmt: skip
_THREE_D = (
    aten.avg_pool3d, aten.max_pool3d, aten.max_pool3d_with_indices, aten.adaptive_avg_pool3d,
    aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d, aten.upsample_trilinear3d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle, aten.im2col,
)  # fmt: skip

RULES: dict[object, Rule] = {
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
    **dict.fromkeys((aten.linalg_solve_triangular, aten.cholesky_solve), solved),
    **dict.fromkeys((aten.cdist, aten._cdist_forward), distances),
}  # fmt: skip


# Inductor's max pool works over as many trailing dimensions as its kernel has.
OPTIONAL: dict[tuple[str, str], Rule] = {
    ("prims", "_low_memory_max_pool_with_offsets"): in_front_of(
        lambda node: len(bound(node)["kernel_size"])
    )
}
