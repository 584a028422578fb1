"""Rules for elementwise operators: out[i] = f(a[i], b[i], ...) after broadcasting.

All labels that are not None must have the same map and dimension, counted from the right. Tables
name the operators without `torch.Tag.pointwise`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

import lorafx.kernels.ops.row_ops  # noqa: F401  (defines torch.ops.lorafx.checked_index)
from lorafx.op_arguments import bound, operand
from lorafx.ownership.flow import Flow, Rule, each_output, outputs
from lorafx.ownership.labels import Digit, Label, Own
from lorafx.ownership.symbolic import divide, equal, is_multiple

aten, prims = torch.ops.aten, torch.ops.prims


def pointwise(node: fx.Node, flow: Flow) -> Label:
    """Every tensor operand is broadcast to the first output."""
    first = outputs(node)[0]
    if not isinstance(first, torch.Tensor):
        return flow.agree(node, map(flow.label, node.all_input_nodes))
    shape = flow.sizes.shape(first)
    for arg in node.all_input_nodes:
        label = flow.label(arg)
        if isinstance(label, Own):
            at = label.dim + len(shape) - len(flow.shape(arg))
            if at < 0 or not equal(flow.shape(arg)[label.dim], shape[at]):
                return flow.lost(node, "an operand is not broadcast to the result")
    return each_output(node, flow.broadcast(node, node.all_input_nodes, len(shape)))


def same_as_first(node: fx.Node, flow: Flow) -> Label:
    """The first argument's entries in place; other operands must be shared."""
    first = operand(node)
    shared = flow.agree(node, [flow.label(a) for a in node.all_input_nodes if a is not first])
    if shared is not None:
        return flow.lost(node, f"an operand that should be shared is {shared}")
    return each_output(node, flow.label(first))


def not_over(worked: Callable[[fx.Node, Flow, int], bool], leading: bool = True) -> Rule:
    """The rule of operators that mix entries along the dimensions d of the first operand where
    `worked`, and share others. With `leading`, further outputs (statistics) have its label."""

    def rule(node: fx.Node, flow: Flow) -> Label:
        label = same_as_first(node, flow)
        first = label[0] if isinstance(label, tuple) else label
        if not isinstance(first, Own):
            return label
        if worked(node, flow, first.dim):
            return each_output(node, flow.lost(node, f"works over {first}"))
        if leading or not isinstance(label, tuple):
            return label
        lost = flow.lost(node, "statistics of several requests")
        return (first, *(lost for _ in outputs(node)[1:]))

    return rule


def in_front_of(trailing: Callable[[fx.Node], int]) -> Rule:
    """Operators that work over the last `trailing` dimensions."""
    return not_over(lambda node, flow, dim: dim >= len(flow.shape(operand(node))) - trailing(node))


def copied(node: fx.Node, flow: Flow) -> Label:
    """copy(self, src): src broadcast to self's shape; self's values are gone."""
    src = bound(node)["src"]
    return flow.aligned(src, len(flow.shape(node)))


def unlabelled(node: fx.Node, flow: Flow) -> Label:
    """A new tensor that takes only shape, dtype and device from the inputs."""
    return each_output(node, None)


def searched(node: fx.Node, flow: Flow) -> Label:
    """Positions of values in a shared table."""
    args = bound(node)
    table = args.get("boundaries", args.get("sorted_sequence", args.get("test_elements")))
    values = args.get("self", args.get("input", args.get("elements")))
    if flow.label(table) is not None:
        return flow.lost(node, "the table searched in depends on requests")
    return flow.label(values)


def scalar_read(node: fx.Node, flow: Flow) -> Label:
    """item(): a size has no label; another number read from requests is Mixed."""
    label = flow.label(operand(node))
    if isinstance(node.meta.get("val"), (int, torch.SymInt)) or label is None:
        return None
    return flow.lost(node, "a number computed from all requests")


def as_real(node: fx.Node, flow: Flow) -> Label:
    """view_as_real and view_as_complex add or drop a last dimension of two."""
    label = flow.label(operand(node))
    if isinstance(label, Own) and label.dim >= min(
        len(flow.shape(node)), len(flow.shape(operand(node)))
    ):
        return flow.lost(node, "the owner dimension holds the parts of complex numbers")
    return label


READS_NO_VALUES = (
    aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like,
    aten.randn_like, aten.randint_like, aten.new_empty, aten.new_zeros, aten.new_ones,
    aten.new_full, aten.new_empty_strided, aten.sym_size, aten.sym_numel, aten.sym_stride,
    aten.sym_storage_offset, aten._assert_async, aten._assert_scalar, aten._assert_tensor_metadata,
    aten.sym_constrain_range, aten.sym_constrain_range_for_size, aten._functional_assert_async,
    aten._print,
)  # fmt: skip

RULES: dict[object, Rule] = {
    **dict.fromkeys(
        (
            aten._to_copy, aten.to, aten.alias, aten.alias_copy, aten.detach, aten.contiguous,
            aten.lift_fresh, aten.lift_fresh_copy, aten.complex, aten.polar, aten.conj, aten._conj,
            aten.real,
            aten.imag, aten.resolve_conj, aten.resolve_neg, aten._neg_view, aten.masked_fill,
            aten._prelu_kernel, aten.floor_divide, aten.fill, aten.native_dropout, aten.dropout,
            aten.rrelu_with_noise, aten.isclose, aten.triu, aten.tril, aten.clip, aten.bernoulli,
            aten.feature_dropout, aten.alpha_dropout, aten.type_as, aten.softplus, aten.copysign,
            aten.frexp, aten.hardswish, aten.log_sigmoid_forward, aten._add_relu,
            aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits, aten.mse_loss,
            aten.huber_loss, aten.smooth_l1_loss, aten.normal, aten.poisson, aten.binomial,
            aten._standard_gamma, aten.fake_quantize_per_tensor_affine_cachemask,
            aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams, aten.__or__,
            aten.__and__, aten.__xor__, prims.abs, prims.maximum,
            prims.minimum, prims.rsqrt,
            prims.convert_element_type, prims.acos, prims.asin, prims.atan, prims.cos, prims.cosh,
            prims.erf,
            prims.exp, prims.expm1, prims.floor, prims.imag, prims.isfinite, prims.log, prims.log1p,
            prims.log10, prims.neg, prims.real, prims.round, prims.sin, prims.sinh, prims.sqrt,
            prims.tan, prims.tanh, prims.add, prims.atan2, prims.bitwise_and, prims.bitwise_or,
            prims.bitwise_xor, prims.div, prims.eq, prims.fmod, prims.ge, prims.gt, prims.le,
            prims.lt, prims.mul, prims.ne, prims.pow, prims.remainder, prims.shift_left, prims.sub,
            prims.where, prims.clone, prims.device_put, prims.view_of, prims.conj, prims.ceil,
            torch.ops.lorafx.checked_index,
        ),
        pointwise,
    ),
    aten.fake_quantize_per_channel_affine_cachemask: same_as_first,
    **dict.fromkeys((aten.copy, aten.copy_), copied),
    **dict.fromkeys((aten.bucketize, aten.searchsorted, aten.isin), searched),
    **dict.fromkeys((aten._local_scalar_dense, aten.item, aten.is_nonzero), scalar_read),
    **dict.fromkeys((aten.view_as_real, aten.view_as_complex), as_real),
    **dict.fromkeys(READS_NO_VALUES, unlabelled),
}  # fmt: skip

# Inductor defines it, which may not be loaded.
OPTIONAL: dict[tuple[str, str], Rule] = {("prims", "fma"): pointwise}


def cast_digit(node: fx.Node, flow: Flow) -> Digit | None:
    """Copies, aliases and casts keep values, unless the type is too narrow."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
        return None
    return flow.digit(operand(node))


def divided_digit(node: fx.Node, flow: Flow) -> Digit | None:
    """t // k: ((w // rows) mod m) // k = (w // (rows·k)) mod (m / k) where k divides m."""
    args = bound(node)
    digit, k = flow.digit(args["self"]), flow.size(args["other"])
    if digit is None or k is None or not k.is_positive or not rounds_down(node):
        return None
    modulus = divide(digit.modulus, k)
    if modulus is None:
        return None
    return Digit(digit.dim, digit.rows * k, modulus, digit.perm)


def rounds_down(node: fx.Node) -> bool:
    """An integer division (values are not negative: truncation is the floor)."""
    rounding = bound(node).get("rounding_mode")
    return node.target.overloadpacket == aten.floor_divide or rounding in ("floor", "trunc")  # type: ignore[union-attr]


def remainder_digit(node: fx.Node, flow: Flow) -> Digit | None:
    """t mod k, where k divides the modulus."""
    args = bound(node)
    digit, k = flow.digit(args["self"]), flow.size(args["other"])
    if digit is None or k is None or not k.is_positive or not is_multiple(digit.modulus, k):
        return None
    return Digit(digit.dim, digit.rows, k, digit.perm)


DIGITS = {
    **dict.fromkeys(
        (
            aten._to_copy, aten.to, aten.alias, aten.detach, aten.contiguous, aten.lift_fresh,
            aten.lift_fresh_copy, aten.clone, prims.clone, prims.convert_element_type,
            prims.device_put, prims.view_of, torch.ops.lorafx.checked_index,
        ),
        cast_digit,
    ),
    **dict.fromkeys((aten.div, aten.floor_divide), divided_digit),
    **dict.fromkeys((aten.remainder, aten.fmod), remainder_digit),
}  # fmt: skip
