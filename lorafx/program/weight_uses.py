"""All uses of a weight in an ATen graph, followed through views and casts.

    linear     y = x Wᵀ          mm, addmm, bmm, baddbmm, linear with W as the right operand
    swapped    y = W xᵀ          mm, bmm with W as the left operand (mamba's dt_proj)
    blocks     y_g = x_g W_gᵀ    the same products with parts of W: a slice of its rows, blocks of
               y_g = x_g W_g     rows by groups, or summed over `out`
    embedding  y = W[ids]
    conv       y = conv(x, W), W (N, C / groups, kernel...)
    unknown    anything else, with the reason

A `WeightForm` (lorafx.program.weight_forms) says which part of W a node is. Uses of the weights of
routed experts, W (E, N, K), or (E, K, N) if stored transposed, followed through casts and
transposes:

    sorted     y = grouped_mm(x, W, offs)    rows sorted by expert, offs (E,) their ends
    chosen     y = bmm(x, W[ids])            a weight gathered for each row
    picked     y = x W[e]ᵀ                   one expert's, whose number is constant
    all        y = bmm(x, W)                 every expert multiplies its rows, x (E, T, K)

One file: one interpreter (`_follow`) runs three tables of handlers, which share what is carried.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import sympy
import torch
from torch import fx

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.kernels.cpu.stored_grouped_mm import STORED_GROUPED_MM
from lorafx.kernels.ops.grouped_ops import Blocks
from lorafx.model.weight_formats import is_dense
from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership import contractions
from lorafx.ownership.flow import called_by
from lorafx.ownership.indexing import is_boolean
from lorafx.program.frame import fake_value
from lorafx.program.weight_forms import FIXED, Axis, WeightForm, same_size

aten = torch.ops.aten
prims = torch.ops.prims

T = TypeVar("T", bound="_Whole")
UseKind = Literal[
    "linear", "blocks", "embedding", "conv", "sorted", "chosen", "picked", "all", "unknown"
]

#: Operators that keep values and sizes.
SAME_VALUE = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default}
    | {aten.lift_fresh_copy.default, aten._to_copy.default, prims.convert_element_type.default}
)
RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim}
    | {aten.squeeze.default, aten.squeeze.dims, aten.unsqueeze.default}
)
PERMUTATIONS = frozenset({aten.t.default, aten.permute.default, aten.transpose.int})


#: The kinds of uses that get a site's op, and the kinds of the sites.
SITE_KINDS = {"linear": "linear", "blocks": "linear", "embedding": "embedding", "conv": "conv"}


@dataclass(frozen=True)
class Use:
    """A use of a weight; `kind` as in the module's equations, or "unknown" for a `reason`.

    Attributes:
        node: the node that computes y; of an unknown use, the node without a rule.
        x: the other operand: x, or the ids of an embedding.
        bias: the addend of an addmm or linear.
        plain: W is neither cast nor broadcast, so that the GEMM may be fused.
        swapped: W is the left operand; the last dimensions of x and y are swapped.
        choice: offs or ids of routed experts, or the number of one.
        blocks: of "blocks"; the groups are the first dimension of x.
        stored: the operand is W in its stored format (int8), without the scale.
        wraps: ids below zero count from the last row.
        gains: numbers, or nodes without dimensions, by which W was multiplied before.
    """

    kind: UseKind
    weight: fx.Node
    node: fx.Node
    x: fx.Node | None = None
    bias: fx.Node | None = None
    plain: bool = False
    swapped: bool = False
    blocks: Blocks | None = None
    choice: fx.Node | int | None = None
    stored: bool = False
    wraps: bool = False
    gains: tuple[Any, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class _Whole:
    """A node that is W, W[ids] of routed experts, or W[e]; its last dimensions are (in, out) if
    `in_first`."""

    weight: fx.Node
    node: fx.Node
    in_first: bool = False
    ids: fx.Node | int | None = None
    stored: bool = False
    gains: tuple[Any, ...] = ()

    def unknown(self, user: fx.Node, reason: str) -> Use:
        return Use("unknown", self.weight, user, stored=self.stored, reason=reason)


@dataclass(frozen=True, kw_only=True)
class _Carrier(_Whole):
    """A node that is W or a part of it; `stored` numbers become W by a product with `scales`."""

    shape: tuple[Any, Any]
    form: WeightForm
    plain: bool
    scales: Collection[fx.Node] = ()

    def as_node(self, node: fx.Node, form: WeightForm, *, plain: bool = False) -> _Carrier:
        return replace(self, node=node, form=form, plain=self.plain and plain)

    @property
    def sizes(self) -> Any:
        return _sizes(fake_value(self.node))

    def is_whole(self, out: int, into: int) -> bool:
        """Whether dimensions `out` and `into` are all of W's, and the others broadcast."""
        form = self.form
        remaining = [axis for dim, axis in enumerate(form.axes) if dim not in (out, into)]
        return (
            not form.out
            and not form.into
            and all(axis.fixed for axis in remaining)
            and _spans(form.axes[out], self.sizes[out], Axis(out=1), self.shape[0])
            and _spans(form.axes[into], self.sizes[into], Axis(into=1), self.shape[1])
        )


def _spans(axis: Axis, size: Any, step: Axis, full: Any) -> bool:
    return same_size(size, full) and (axis == step or (axis.fixed and same_size(size, 1)))


def uses_of(
    weight: fx.Node,
    *,
    transposed: bool,
    part: tuple[WeightForm, tuple[int, int]] | None = None,
    scales: Collection[fx.Node] = (),
) -> list[Use]:
    """All uses of the 2-D `weight`; `transposed` if stored (in, out).

    For a view or copy of W, `part` is its form and W's (N, K). `scales` are graph inputs that may
    turn stored numbers into W.
    """
    if part is None:
        form = WeightForm.of_weight(transposed=transposed)
        rows, columns = _sizes(fake_value(weight))
        shape = (columns, rows) if transposed else (rows, columns)
    else:
        form, shape = part
        for size in fake_value(weight).shape:
            int(size)  # a guard: an attribute's sizes may be symbols, the weight's are not
    stored = not is_dense(fake_value(weight))
    plain = part is None and not stored
    start = _Carrier(weight, weight, shape=shape, form=form, plain=plain, scales=scales)
    return _follow(replace(start, stored=stored), _HANDLERS)


def _follow(start: T, handlers: Mapping[Any, _Handler]) -> list[Use]:
    """All uses of the weight in `start`; handlers map a user to further carriers and uses."""
    uses: list[Use] = []
    pending = [start]
    while pending:
        carrier = pending.pop()
        for user in list(carrier.node.users):
            for outcome in _interpret(carrier, user, handlers):
                if isinstance(outcome, Use):
                    uses.append(replace(outcome, stored=carrier.stored, gains=carrier.gains))
                else:
                    pending.append(outcome)
    return uses


def _sizes(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(
        int(size)
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Integer)
        else size
        for size in value.shape
    )


def _interpret(carrier: T, user: fx.Node, handlers: Mapping[Any, _Handler]) -> Sequence[T | Use]:
    if user.op == "output":
        return [carrier.unknown(user, "the weight itself is returned")]
    value = fake_value(user)
    if value is None or isinstance(value, (int, torch.SymInt)):
        return []  # only its sizes are read
    handler = handlers.get(GROUPED_MM if is_grouped(user) else user.target)
    if handler is None:
        return [carrier.unknown(user, f"no rule for {user.target}")]
    outcome = handler(carrier, user)
    return outcome if isinstance(outcome, list) else [outcome]


def _same_value(carrier: _Carrier, user: fx.Node) -> _Carrier:
    before, after = fake_value(carrier.node).dtype, fake_value(user).dtype
    return carrier.as_node(user, carrier.form, plain=before == after)


def order_of(user: fx.Node, dims: int) -> list[int]:
    """The operand's dimensions in the order of a transpose or permutation."""
    call = bound(user)
    if user.target is aten.permute.default:
        return [int(dim) % dims for dim in call["dims"]]
    order = list(range(dims))
    if user.target is aten.t.default:
        return order[::-1]
    first, second = (int(call[name]) % dims for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def _permute(carrier: _Carrier, user: fx.Node) -> _Carrier:
    order = order_of(user, len(carrier.form.axes))
    return carrier.as_node(user, carrier.form.permuted(order), plain=True)


def _expand(carrier: _Carrier, user: fx.Node) -> _Carrier:
    front = len(fake_value(user).shape) - len(carrier.form.axes)
    axes = (FIXED,) * front + carrier.form.axes
    return carrier.as_node(user, carrier.form._replace(axes=axes), plain=not front)


def _reshape(carrier: _Carrier, user: fx.Node) -> _Carrier | Use:
    after = _sizes(fake_value(user))
    form = carrier.form.reshaped(carrier.sizes, after)
    if form is None:
        return carrier.unknown(user, "its rows are merged or split by a reshape")
    return carrier.as_node(user, form, plain=len(after) == 2)


def _slice(carrier: _Carrier, user: fx.Node) -> _Carrier | Use:
    call = bound(user)
    dim, start, step = call["dim"] % len(carrier.form.axes), call["start"] or 0, call["step"]
    size, kept = carrier.sizes[dim], _sizes(fake_value(user))[dim]
    if same_size(size, kept) and start == 0 and step == 1:
        return carrier.as_node(user, carrier.form, plain=True)
    if not all(isinstance(number, int) for number in (size, start, step)):
        return carrier.unknown(user, "it is sliced by a size that is not constant")
    start = max(start + size, 0) if start < 0 else min(start, size)
    return _part(carrier, user, carrier.form.sliced(dim, start, step))


def _select(carrier: _Carrier, user: fx.Node) -> _Carrier | Use:
    call = bound(user)
    dim, index = call["dim"] % len(carrier.form.axes), call["index"]
    size = carrier.sizes[dim]
    if not isinstance(index, int) or not isinstance(size, int):
        return carrier.unknown(user, "it is indexed by a size that is not constant")
    return _part(carrier, user, carrier.form.selected(dim, index % size))


def _part(carrier: _Carrier, user: fx.Node, form: WeightForm | None) -> _Carrier | Use:
    if form is None:
        return carrier.unknown(user, "copies of it are cut")
    return carrier.as_node(user, form)


def _split(carrier: _Carrier, user: fx.Node) -> list[_Carrier | Use]:
    dim, parts = bound(user)["dim"] % len(carrier.form.axes), fake_value(user)
    single = user.target is aten.unbind.int
    sizes = [1 if single else _sizes(part)[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return [carrier.unknown(user, "it is split by a size that is not constant")]
    outcomes: list[_Carrier | Use] = []
    for item in user.users:
        if item.target is not operator.getitem:
            outcomes.append(carrier.unknown(item, "several of its parts are used together"))
            continue
        start, whole = sum(sizes[: index_of(item)]), carrier.form
        form = whole.selected(dim, start) if single else whole.sliced(dim, start, 1)
        outcomes.append(_part(carrier, item, form))
    return outcomes


def _scale(carrier: _Carrier, user: fx.Node) -> _Carrier | Use:
    call = bound(user)
    first, second = call["self"], call["other"]
    other = second if first is carrier.node else first
    if not carrier.stored and _is_number(other):
        return replace(carrier, node=user, plain=False, gains=(*carrier.gains, other))
    scale = _input_of(other) if isinstance(other, fx.Node) else None
    same_sizes = _sizes(fake_value(user)) == carrier.sizes
    if not carrier.stored or scale not in carrier.scales or first is second or not same_sizes:
        return carrier.unknown(user, f"no rule for {user.target} of it and a tensor")
    return replace(carrier, node=user, stored=False)


def _divide(carrier: _Carrier, user: fx.Node) -> _Carrier | Use:
    number = -1.0 if user.target is aten.neg.default else bound(user)["other"]
    if not isinstance(number, (int, float)) or not number:
        return carrier.unknown(user, f"no rule for {user.target} of it and a tensor")
    return replace(carrier, node=user, plain=False, gains=(*carrier.gains, 1 / number))


def _is_number(value: Any) -> bool:
    if isinstance(value, fx.Node):
        known = fake_value(value)
        return is_constant(value) and isinstance(known, torch.Tensor) and known.dim() == 0
    return isinstance(value, (int, float))


def _product(carrier: _Carrier, user: fx.Node) -> Use:
    call = bound(user)
    addend, *operands = contractions.PRODUCTS[called_by(user)]
    bias = call.get(addend)
    left, right = (call[name] for name in operands)
    if any(call.get(name, 1) != 1 for name in ("alpha", "beta")):
        return carrier.unknown(user, "a product with alpha or beta other than 1")
    if left is right or bias is carrier.node:
        return carrier.unknown(user, "it is multiplied by itself")
    last = len(carrier.form.axes) - 1
    if right is carrier.node:
        if carrier.is_whole(out=last, into=last - 1):
            return Use("linear", carrier.weight, user, x=left, bias=bias, plain=carrier.plain)
        return _by_blocks(carrier, user, left, summed=last - 1, kept=last)
    if bias is not None:
        return carrier.unknown(user, "W xᵀ with an addend")
    if carrier.is_whole(out=last - 1, into=last):
        return Use("linear", carrier.weight, user, x=right, swapped=True)
    return _by_blocks(carrier, user, right, summed=last, kept=last - 1, swapped=True)


def _linear(carrier: _Carrier, user: fx.Node) -> Use:
    call = bound(user)
    x, weight = call["input"], call["weight"]
    if weight is not carrier.node or x is carrier.node:
        return carrier.unknown(user, "a linear in which the weight is both operands")
    if carrier.is_whole(out=0, into=1):
        return Use("linear", carrier.weight, user, x=x, bias=call["bias"], plain=carrier.plain)
    return _by_blocks(carrier, user, x, summed=1, kept=0)


def _by_blocks(
    carrier: _Carrier, user: fx.Node, x: fx.Node, *, summed: int, kept: int, swapped: bool = False
) -> Use:
    """A product with blocks of W: `summed` runs along x's features, `kept` along y's."""
    axes, sizes = carrier.form.axes, carrier.sizes
    groups, group = 1, FIXED
    if len(axes) == 3 and not axes[0].fixed:
        groups, group = axes[0].period or sizes[0], axes[0]
    inner, outer = axes[summed], axes[kept]
    over_out = bool(inner.out or outer.into)
    along_out, along_in = (inner, outer) if over_out else (outer, inner)
    if inner.period or outer.period or not isinstance(groups, int):
        return carrier.unknown(user, "a product with several copies of it side by side")
    if along_out.into or along_in.out:
        return carrier.unknown(user, "a product that contracts only one of its dimensions")
    if not all(isinstance(sizes[dim], int) for dim in (summed, kept)):
        return carrier.unknown(user, "a product with a part of it whose size is not constant")
    blocks = Blocks(
        groups,
        (carrier.form.out, group.out, along_out.out),
        (carrier.form.into, group.into, along_in.into),
        over_out,
    )
    return Use("blocks", carrier.weight, user, x=x, swapped=swapped, blocks=blocks)


def _embedding(carrier: _Carrier, user: fx.Node) -> Use:
    call = bound(user)
    if call["weight"] is not carrier.node or not carrier.is_whole(out=0, into=1):
        return carrier.unknown(user, "an embedding lookup in a rearranged weight")
    return Use("embedding", carrier.weight, user, x=call["indices"], plain=carrier.plain)


def _index(carrier: _Carrier, user: fx.Node) -> Use:
    """W[ids], which may count from the end."""
    indices = bound(user)["indices"]
    rows = len(indices) == 1 and indices[0] is not None and not is_boolean(indices[0])
    if not rows or not carrier.is_whole(out=0, into=1):
        return carrier.unknown(user, "it is indexed by more than the numbers of its rows")
    return Use("embedding", carrier.weight, user, x=indices[0], wraps=True)


_Handler = Callable[[Any, fx.Node], Any]
_HANDLERS: dict[Any, _Handler] = {
    **dict.fromkeys(SAME_VALUE, _same_value),
    **dict.fromkeys(PERMUTATIONS, _permute),
    aten.expand.default: _expand,
    **dict.fromkeys(RESHAPES, _reshape),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int), _split),
    **{op.default: _product for op in contractions.PRODUCTS},
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.mul.Tensor: _scale,
    **dict.fromkeys((aten.div.Tensor, aten.neg.default), _divide),
}


def is_constant(node: fx.Node) -> bool:
    """Whether a node is a graph input (a bias), or a view or cast of one."""
    return _input_of(node) is not None


def _input_of(node: fx.Node) -> fx.Node | None:
    while node.op == "call_function" and (node.target in SAME_VALUE or node.target in RESHAPES):
        source = operand(node)
        if not isinstance(source, fx.Node):
            return None
        node = source
    return node if node.op == "placeholder" else None


CONVOLUTION = torch.ops.aten.convolution.default


def _kept(carrier: _Whole, user: fx.Node) -> _Whole:
    return replace(carrier, node=user)


def _convolved(carrier: _Whole, user: fx.Node) -> Use:
    call = bound(user)
    if call["weight"] is not carrier.node or carrier.node in (call["input"], call["bias"]):
        return carrier.unknown(user, "a convolution of it, or with it as the bias")
    return Use("conv", carrier.weight, user, x=call["input"], bias=call["bias"])


def convolution_uses(weight: fx.Node) -> list[Use]:
    """All convolutions with `weight`."""
    handlers = {**dict.fromkeys(SAME_VALUE, _kept), CONVOLUTION: _convolved}
    return _follow(_Whole(weight, weight), handlers)


def expert_uses(weight: fx.Node, *, transposed: bool) -> list[Use]:
    """All uses of the 3-D `weight` of routed experts; `transposed` if stored (E, K, N)."""
    return _follow(_Whole(weight, weight, transposed), _OF_EXPERTS)


def _transposed(carrier: _Whole, user: fx.Node) -> _Whole | Use:
    dims = fake_value(user).dim()
    order = order_of(user, dims)
    if dims == 3 and order[0] != 0:
        return carrier.unknown(user, "its dimensions are permuted")
    swapped = order[-2:] == [dims - 1, dims - 2]
    return replace(carrier, node=user, in_first=carrier.in_first != swapped)


def _picked(carrier: _Whole, user: fx.Node) -> _Whole | Use:
    index, dim, sizes = bound(user)["index"], bound(user)["dim"], fake_value(carrier.node).shape
    if carrier.ids is not None or dim % len(sizes) or not isinstance(index, int):
        return carrier.unknown(user, "it is not indexed by one expert's number")
    return replace(carrier, node=user, ids=index % sizes[0])


def _by_one(carrier: _Whole, user: fx.Node) -> Use:
    """x W[e]ᵀ, with or without an addend."""
    call = bound(user)
    of_linear = ("bias", "input", "weight")
    addend, left, right = contractions.PRODUCTS.get(called_by(user), of_linear)
    out_first, fits = user.target is aten.linear.default, isinstance(carrier.ids, int)
    fits &= call[right] is carrier.node and carrier.node not in (call[left], call.get(addend))
    fits &= all(call.get(name, 1) == 1 for name in ("alpha", "beta"))
    if fits and carrier.in_first is not out_first:
        return Use("picked", carrier.weight, user, call[left], choice=carrier.ids)
    return carrier.unknown(user, "a product with x W in place of x Wᵀ")


def _chosen(carrier: _Whole, user: fx.Node) -> _Whole | Use:
    by_dim = bound(user)["indices"]
    indices = [index for index in by_dim if index is not None]
    first = carrier.ids is None and len(indices) == 1 and by_dim[0] is indices[0]
    if first and fake_value(indices[0]).dim() == 1 and not is_boolean(indices[0]):
        return replace(carrier, node=user, ids=indices[0])
    return carrier.unknown(user, "it is not indexed by one expert per row")


def _sorted(carrier: _Whole, user: fx.Node) -> Use:
    x, right, offs, _ = grouped(user)
    if right is carrier.node and carrier.in_first and carrier.ids is None and offs is not None:
        return Use("sorted", carrier.weight, user, x, choice=offs)
    return carrier.unknown(user, "a grouped product with x W in place of x Wᵀ")


def _stored(carrier: _Whole, user: fx.Node) -> Use | list[Use]:
    """A grouped product with quantised experts, whose first part stands for all of them."""
    call = bound(user)
    fits = carrier.node is carrier.weight and carrier.node in call["weight"]
    if not fits or call["transposed"] is not carrier.in_first:
        return carrier.unknown(user, "a grouped product with x W in place of x Wᵀ, or another W")
    if carrier.node is not call["weight"][0]:
        return []
    return Use("sorted", carrier.weight, user, call["input"], choice=call["offs"])


def _batched(carrier: _Whole, user: fx.Node) -> Use:
    call = bound(user)
    left, right = call["self"], call["mat2"]
    kind: UseKind = "all" if carrier.ids is None else "chosen"
    fits = right is carrier.node and left is not carrier.node and carrier.in_first
    if fits and (kind == "all" or same_size(fake_value(left).shape[1], 1)):
        return Use(kind, carrier.weight, user, left, choice=carrier.ids)
    swapped = left is carrier.node and right is not carrier.node and not carrier.in_first
    if swapped and kind == "chosen" and same_size(fake_value(right).shape[2], 1):
        return Use(kind, carrier.weight, user, right, choice=carrier.ids, swapped=True)
    return carrier.unknown(user, "a product with x W in place of x Wᵀ")


_OF_EXPERTS: dict[Any, _Handler] = {
    **dict.fromkeys(SAME_VALUE, _kept),
    **dict.fromkeys(PERMUTATIONS, _transposed),
    aten.index.Tensor: _chosen,
    aten.select.int: _picked,
    **dict.fromkeys((aten.mm.default, aten.addmm.default, aten.linear.default), _by_one),
    GROUPED_MM: _sorted,
    STORED_GROUPED_MM: _stored,
    aten.bmm.default: _batched,
}


def is_grouped(node: fx.Node) -> bool:
    """Whether `node` is a product of sorted rows with the weights of all experts."""
    if node.target in (aten._grouped_mm.default, GROUPED_MM):
        return True
    # transformers' op, where torch's cannot be compiled.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return fallback is not None and called_by(node) is fallback


class Grouped(NamedTuple):
    """The operands of a product of sorted rows; `plain` if the node has no others."""

    x: Any
    weight: Any
    offs: Any
    plain: bool


def grouped(node: fx.Node) -> Grouped:
    """The operands of a grouped node, under the names of either op."""
    call = bound(node)
    if node.target is aten._grouped_mm.default:
        extras = call["bias"], call["out_dtype"]
        return Grouped(call["self"], call["mat2"], call["offs"], not any(extras))
    return Grouped(call["input"], call["weight"], call["offs"], True)
