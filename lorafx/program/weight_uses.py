"""All uses of a weight in an ATen graph, followed through views and casts.

    linear     y = x Wᵀ          mm, addmm, bmm, baddbmm, linear with W as the right operand
    swapped    y = W xᵀ          mm, bmm with W as the left operand (mamba's dt_proj)
    blocks     y_g = x_g W_gᵀ    the same products, where W enters by parts: a slice of its rows,
               y_g = x_g W_g     blocks of them by groups, or summed over `out`
    embedding  y = W[ids]
    conv       y = conv(x, W), W (N, C / groups, kernel...)
    unknown    anything else, with the reason

The part of W in a node is its `WeightForm` (lorafx.program.derived). With the weights of routed
experts W (E, N, K), or (E, K, N) if stored transposed, seen through casts and transposes:

    sorted     y = grouped_mm(x, W, offs)    rows sorted by expert, offs (E,) where each one's end
    chosen     y = bmm(x, W[ids])            a weight gathered for each row
    all        y = bmm(x, W)                 every expert multiplies its rows, x (E, T, K)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import sympy
import torch
from torch import fx

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.kernels.ops.grouped_ops import Blocks
from lorafx.model.weight_formats import is_dense
from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership import contractions
from lorafx.ownership.indexing import is_boolean
from lorafx.ownership.propagate import called_by
from lorafx.program.derived import FIXED, Axis, WeightForm, same_size
from lorafx.program.frame import fake_value

aten = torch.ops.aten
prims = torch.ops.prims

T = TypeVar("T")
UseKind = Literal["linear", "blocks", "embedding", "conv", "sorted", "chosen", "all", "unknown"]

#: W or y seen through these, with the same values and shape semantics, is still W or y.
SAME_VALUE = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default}
    | {aten.lift_fresh_copy.default, aten._to_copy.default, prims.convert_element_type.default}
)
RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim}
    | {aten.squeeze.default, aten.squeeze.dims, aten.unsqueeze.default}
)


@dataclass(frozen=True)
class Use:
    """A use of a weight; `kind` as in the module's equations, or "unknown" for a `reason`.

    Attributes:
        node: the node that computes y ("unknown": the node without a rule).
        x: the other operand: x, or the ids of an embedding.
        bias: the addend of an addmm or linear.
        plain: W enters uncast and not broadcast, so that the GEMM may be fused.
        swapped: W is the left operand; the last dimensions of x and y are swapped.
        choice: for routed experts, offs or ids.
        blocks: for "blocks"; the groups are the first dimension of x.
        stored: W enters in its stored format (int8), without its scale.
    """

    kind: UseKind
    weight: fx.Node
    node: fx.Node
    x: fx.Node | None = None
    bias: fx.Node | None = None
    plain: bool = False
    swapped: bool = False
    blocks: Blocks | None = None
    choice: fx.Node | None = None
    stored: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _Held:
    """`node` holds W or part of it; `stored` numbers become W after a product with `scales`."""

    weight: fx.Node
    shape: tuple[Any, Any]
    node: fx.Node
    form: WeightForm
    plain: bool
    stored: bool = False
    scales: Collection[fx.Node] = ()

    def as_node(self, node: fx.Node, form: WeightForm, *, plain: bool = False) -> _Held:
        return replace(self, node=node, form=form, plain=self.plain and plain)

    def unknown(self, user: fx.Node, reason: str) -> Use:
        return Use("unknown", self.weight, user, stored=self.stored, reason=reason)

    @property
    def sizes(self) -> Any:
        return _sizes(fake_value(self.node))

    def is_whole(self, out: int, into: int) -> bool:
        """Whether dimensions `out` and `into` are all of W's, and the others broadcast."""
        form = self.form
        others = [axis for dim, axis in enumerate(form.axes) if dim not in (out, into)]
        return (
            not form.out
            and not form.into
            and all(axis.fixed for axis in others)
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
    return _followed(
        _Held(weight, shape, weight, form, part is None and not stored, stored, scales), _interpret
    )


def _followed(start: T, interpret: Callable[[T, fx.Node], list[T | Use]]) -> list[Use]:
    """All uses of what `start` holds, whose users are what holds it too, or uses."""
    found: list[Use] = []
    pending = [start]
    while pending:
        held = pending.pop()
        for user in list(held.node.users):  # type: ignore[attr-defined]
            for outcome in interpret(held, user):
                if isinstance(outcome, Use):
                    found.append(outcome)
                else:
                    pending.append(outcome)
    return found


def _sizes(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(
        int(size)
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Integer)
        else size
        for size in value.shape
    )


def _interpret(held: _Held, user: fx.Node) -> list[_Held | Use]:
    if user.op == "output":
        return [held.unknown(user, "the weight itself is returned")]
    value = fake_value(user)
    if value is None or isinstance(value, (int, torch.SymInt)):
        return []
    handler = _HANDLERS.get(user.target)
    if handler is None:
        return [held.unknown(user, f"no rule for {user.target}")]
    outcome = handler(held, user)
    found = outcome if isinstance(outcome, list) else [outcome]
    return [replace(item, stored=held.stored) if isinstance(item, Use) else item for item in found]


def _same(held: _Held, user: fx.Node) -> _Held:
    before, after = fake_value(held.node).dtype, fake_value(user).dtype
    return held.as_node(user, held.form, plain=before == after)


def order_of(user: fx.Node, dims: int) -> list[int]:
    """The operand's dimensions in a transpose's or permutation's order."""
    call = bound(user)
    if user.target is aten.permute.default:
        return [int(dim) % dims for dim in call["dims"]]
    order = list(range(dims))
    if user.target is aten.t.default:
        return order[::-1]
    first, second = (int(call[name]) % dims for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def _swap(held: _Held, user: fx.Node) -> _Held:
    order = order_of(user, len(held.form.axes))
    return held.as_node(user, held.form.permuted(order), plain=True)


def _expand(held: _Held, user: fx.Node) -> _Held:
    front = len(fake_value(user).shape) - len(held.form.axes)
    axes = (FIXED,) * front + held.form.axes
    return held.as_node(user, held.form._replace(axes=axes), plain=not front)


def _reshape(held: _Held, user: fx.Node) -> _Held | Use:
    after = _sizes(fake_value(user))
    form = held.form.reshaped(held.sizes, after)
    if form is None:
        return held.unknown(user, "its rows are merged or split by a reshape")
    return held.as_node(user, form, plain=len(after) == 2)


def _slice(held: _Held, user: fx.Node) -> _Held | Use:
    given = bound(user)
    dim, start, step = given["dim"] % len(held.form.axes), given["start"] or 0, given["step"]
    size, rest = held.sizes[dim], _sizes(fake_value(user))[dim]
    if same_size(size, rest) and start == 0 and step == 1:
        return held.as_node(user, held.form, plain=True)
    if not all(isinstance(number, int) for number in (size, start, step)):
        return held.unknown(user, "it is sliced by a size that is not constant")
    start = max(start + size, 0) if start < 0 else min(start, size)
    return _part(held, user, held.form.sliced(dim, start, step))


def _select(held: _Held, user: fx.Node) -> _Held | Use:
    call = bound(user)
    dim, index = call["dim"] % len(held.form.axes), call["index"]
    size = held.sizes[dim]
    if not isinstance(index, int) or not isinstance(size, int):
        return held.unknown(user, "it is indexed by a size that is not constant")
    return _part(held, user, held.form.selected(dim, index % size))


def _part(held: _Held, user: fx.Node, form: WeightForm | None) -> _Held | Use:
    if form is None:
        return held.unknown(user, "copies of it are cut")
    return held.as_node(user, form)


def _taken_apart(held: _Held, user: fx.Node) -> list[_Held | Use]:
    dim, parts = bound(user)["dim"] % len(held.form.axes), fake_value(user)
    single = user.target is aten.unbind.int
    sizes = [1 if single else _sizes(part)[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return [held.unknown(user, "it is split by a size that is not constant")]
    found: list[_Held | Use] = []
    for item in user.users:
        if item.target is not operator.getitem:
            found.append(held.unknown(item, "several of its parts are used together"))
            continue
        start, form = sum(sizes[: index_of(item)]), held.form
        found.append(
            _part(held, item, form.selected(dim, start) if single else form.sliced(dim, start, 1))
        )
    return found


def _scaled(held: _Held, user: fx.Node) -> _Held | Use:
    call = bound(user)
    first, second = call["self"], call["other"]
    other = second if first is held.node else first
    scale = _input_of(other) if isinstance(other, fx.Node) else None
    same_sizes = _sizes(fake_value(user)) == held.sizes
    if not held.stored or scale not in held.scales or first is second or not same_sizes:
        return held.unknown(user, f"no rule for {user.target}")
    return replace(held, node=user, stored=False)


def _product(held: _Held, user: fx.Node) -> Use:
    call = bound(user)
    addend, *operands = contractions.PRODUCTS[called_by(user)]
    bias = call.get(addend)
    left, right = (call[name] for name in operands)
    if any(call.get(name, 1) != 1 for name in ("alpha", "beta")):
        return held.unknown(user, "a product with alpha or beta other than 1")
    if left is right or bias is held.node:
        return held.unknown(user, "it is multiplied by itself")
    last = len(held.form.axes) - 1
    if right is held.node:
        if held.is_whole(out=last, into=last - 1):
            return Use("linear", held.weight, user, x=left, bias=bias, plain=held.plain)
        return _by_blocks(held, user, left, summed=last - 1, kept=last)
    if bias is not None:
        return held.unknown(user, "W xᵀ with an addend")
    if held.is_whole(out=last - 1, into=last):
        return Use("linear", held.weight, user, x=right, swapped=True)
    return _by_blocks(held, user, right, summed=last, kept=last - 1, swapped=True)


def _linear(held: _Held, user: fx.Node) -> Use:
    call = bound(user)
    x, weight = call["input"], call["weight"]
    if weight is not held.node or x is held.node:
        return held.unknown(user, "a linear in which the weight is both operands")
    if held.is_whole(out=0, into=1):
        return Use("linear", held.weight, user, x=x, bias=call["bias"], plain=held.plain)
    return _by_blocks(held, user, x, summed=1, kept=0)


def _by_blocks(
    held: _Held, user: fx.Node, x: fx.Node, *, summed: int, kept: int, swapped: bool = False
) -> Use:
    """A product with blocks of W: `summed` runs along x's features, `kept` along y's."""
    axes, sizes = held.form.axes, held.sizes
    groups, group = 1, FIXED
    if len(axes) == 3 and not axes[0].fixed:
        groups, group = axes[0].period or sizes[0], axes[0]
    inner, outer = axes[summed], axes[kept]
    over_out = bool(inner.out or outer.into)
    along_out, along_in = (inner, outer) if over_out else (outer, inner)
    if inner.period or outer.period or not isinstance(groups, int):
        return held.unknown(user, "a product with several copies of it side by side")
    if along_out.into or along_in.out:
        return held.unknown(user, "a product that contracts only one of its dimensions")
    if not all(isinstance(sizes[dim], int) for dim in (summed, kept)):
        return held.unknown(user, "a product with a part of it whose size is not constant")
    blocks = Blocks(
        groups,
        (held.form.out, group.out, along_out.out),
        (held.form.into, group.into, along_in.into),
        over_out,
    )
    return Use("blocks", held.weight, user, x=x, swapped=swapped, blocks=blocks)


def _embedding(held: _Held, user: fx.Node) -> Use:
    call = bound(user)
    if call["weight"] is not held.node or not held.is_whole(out=0, into=1):
        return held.unknown(user, "an embedding lookup in a rearranged weight")
    return Use("embedding", held.weight, user, x=call["indices"], plain=held.plain)


_Handler = Callable[[_Held, fx.Node], "_Held | Use | list[_Held | Use]"]
_HANDLERS: dict[Any, _Handler] = {
    **dict.fromkeys(SAME_VALUE, _same),
    **dict.fromkeys((aten.t.default, aten.permute.default, aten.transpose.int), _swap),
    aten.expand.default: _expand,
    **dict.fromkeys(RESHAPES, _reshape),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int), _taken_apart
    ),
    **{op.default: _product for op in contractions.PRODUCTS},
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.mul.Tensor: _scaled,
}


def is_constant(node: fx.Node) -> bool:
    """Whether a node is a graph input (a bias) seen through views and casts."""
    return _input_of(node) is not None


def _input_of(node: fx.Node) -> fx.Node | None:
    while node.op == "call_function" and (node.target in SAME_VALUE or node.target in RESHAPES):
        source = operand(node)
        if not isinstance(source, fx.Node):
            return None
        node = source
    return node if node.op == "placeholder" else None


CONVOLUTION = torch.ops.aten.convolution.default


@dataclass(frozen=True)
class _Whole:
    """`node` is W, or W[ids], with (in, out) as its last dimensions if `in_first`."""

    weight: fx.Node
    node: fx.Node
    in_first: bool = False
    ids: fx.Node | None = None

    def unknown(self, user: fx.Node, reason: str) -> Use:
        return Use("unknown", self.weight, user, reason=reason)


def convolution_uses(weight: fx.Node) -> list[Use]:
    """All convolutions with `weight`."""
    return _followed(_Whole(weight, weight), _convolved)


def _convolved(held: _Whole, user: fx.Node) -> list[_Whole | Use]:
    if isinstance(fake_value(user), (int, torch.SymInt)):
        return []  # of its sizes
    if user.target in SAME_VALUE:
        return [replace(held, node=user)]
    call = bound(user) if user.target is CONVOLUTION else {}
    if call.get("weight") is held.node and held.node not in (call["input"], call["bias"]):
        return [Use("conv", held.weight, user, x=call["input"], bias=call["bias"])]
    return [held.unknown(user, f"no rule for {user.target}")]


GROUPED = frozenset({aten._grouped_mm.default})
#: transformers' op, where torch's cannot be compiled: (namespace, name).
FALLBACK = ("transformers", "grouped_mm_fallback")


def expert_uses(weight: fx.Node, *, transposed: bool) -> list[Use]:
    """All uses of the 3-D `weight` of routed experts; `transposed` if stored (E, K, N)."""
    return _followed(_Whole(weight, weight, transposed), _by_experts)


def _by_experts(held: _Whole, user: fx.Node) -> list[_Whole | Use]:
    if user.op == "output":
        return [held.unknown(user, "the weight itself is returned")]
    value = fake_value(user)
    if value is None or isinstance(value, (int, torch.SymInt)):
        return []
    if user.target in SAME_VALUE:
        return [replace(held, node=user)]
    if user.target in (aten.transpose.int, aten.permute.default):
        order = order_of(user, 3)
        if order[0] != 0:
            return [held.unknown(user, "its dimensions are permuted")]
        return [replace(held, node=user, in_first=held.in_first != (order == [0, 2, 1]))]
    if user.target is aten.index.Tensor and held.ids is None:
        given = bound(user)["indices"]
        indices = [index for index in given if index is not None]
        first = len(indices) == 1 and given[0] is indices[0]
        if first and fake_value(indices[0]).dim() == 1 and not is_boolean(indices[0]):
            return [replace(held, node=user, ids=indices[0])]
        return [held.unknown(user, "it is not indexed by one expert per row")]
    if is_grouped(user):
        x, right, offs, _ = grouped(user)
        if right is held.node and held.in_first and held.ids is None and offs is not None:
            return [Use("sorted", held.weight, user, x, choice=offs)]
        return [held.unknown(user, "a grouped product with x W in place of x Wᵀ")]
    if user.target is aten.bmm.default:
        return [_batched(held, user)]
    return [held.unknown(user, f"no rule for {user.target}")]


def _batched(held: _Whole, user: fx.Node) -> Use:
    call = bound(user)
    left, right = call["self"], call["mat2"]
    kind: UseKind = "all" if held.ids is None else "chosen"
    fits = right is held.node and left is not held.node and held.in_first
    if fits and (kind == "all" or same_size(fake_value(left).shape[1], 1)):
        return Use(kind, held.weight, user, left, choice=held.ids)
    swapped = left is held.node and right is not held.node and not held.in_first
    if swapped and kind == "chosen" and same_size(fake_value(right).shape[2], 1):
        return Use(kind, held.weight, user, right, choice=held.ids, swapped=True)
    return held.unknown(user, "a product with x W in place of x Wᵀ")


def is_grouped(node: fx.Node) -> bool:
    """Whether it is a product of sorted rows with the weights of all experts."""
    if node.target in GROUPED or node.target is GROUPED_MM:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    namespace = getattr(torch.ops, FALLBACK[0], None)
    return packet is not None and packet is getattr(namespace, FALLBACK[1], None)


class Grouped(NamedTuple):
    """The operands of a product of sorted rows; `plain` if there are no others."""

    x: Any
    weight: Any
    offs: Any
    plain: bool


def grouped(node: fx.Node) -> Grouped:
    """The operands of a grouped node, under the names of either op."""
    call = bound(node)
    if node.target in GROUPED:
        others = call["bias"], call["out_dtype"]
        return Grouped(call["self"], call["mat2"], call["offs"], not any(others))
    return Grouped(call["input"], call["weight"], call["offs"], True)
