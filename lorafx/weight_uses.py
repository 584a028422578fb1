"""Every way in which a weight is used in an ATen graph, followed through views and casts.

    linear     y = x Wᵀ          mm, addmm, bmm, baddbmm, linear with W as the right operand
    swapped    y = W xᵀ          mm, bmm with W as the left operand (mamba's dt_proj)
    embedding  y = W[ids]
    unknown    anything else, with the reason

A *form* is W seen through views: which of its dimensions is out, which is in, while all others are
of size one or broadcast. einsum takes W through (out, in, 1) and (1, 1, out, in) to (1, in, out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from lorafx.frame import arguments_of, fake_value

aten = torch.ops.aten
prims = torch.ops.prims

UseKind = Literal["linear", "swapped", "embedding", "unknown"]

#: Same value, same shape semantics: W or y seen through them is still W or y.
SAME_VALUE = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
        aten._to_copy.default,
        prims.convert_element_type.default,
    }
)
RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim}
    | {aten.squeeze.default, aten.squeeze.dims, aten.unsqueeze.default}
)


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        kind: what is computed; see the module's equations.
        weight: the graph input that holds W.
        node: the node that computes y (for "unknown": the node that is not understood).
        x: the other operand: x, or the ids of an embedding.
        bias: the addend of an addmm or linear.
        plain: True where W enters uncast and not broadcast, so that the GEMM may be fused.
        reason: for "unknown", why.
    """

    kind: UseKind
    weight: fx.Node
    node: fx.Node
    x: fx.Node | None = None
    bias: fx.Node | None = None
    plain: bool = False
    reason: str = ""


OUT, IN = 0, 1
Axes = tuple["int | None", ...]


@dataclass(frozen=True)
class _Form:
    """`node` is W with its dimensions `axes`: OUT, IN, or None for size one and broadcast."""

    weight: fx.Node
    node: fx.Node
    axes: Axes
    plain: bool

    @property
    def out_first(self) -> bool:
        return self.axes[-2:] == (OUT, IN)

    @property
    def in_first(self) -> bool:
        return self.axes[-2:] == (IN, OUT)


def uses_of(weight: fx.Node, *, transposed: bool) -> list[Use]:
    """All uses of the 2-D weight held by `weight`; `transposed` where it is stored (in, out)."""
    found: list[Use] = []
    pending = [_Form(weight, weight, (IN, OUT) if transposed else (OUT, IN), plain=True)]
    while pending:
        form = pending.pop()
        for user in list(form.node.users):
            outcome = _interpret(form, user)
            if isinstance(outcome, _Form):
                pending.append(outcome)
            elif outcome is not None:
                found.append(outcome)
    return found


def _interpret(form: _Form, user: fx.Node) -> _Form | Use | None:
    """What `user` does with the weight: another form of it, a use, or nothing (its sizes)."""
    if user.op == "output":
        return Use("unknown", form.weight, user, reason="the weight itself is returned")
    value = fake_value(user)
    if value is None or isinstance(value, (int, torch.SymInt)):
        return None
    for table, handler in _HANDLERS:
        if user.target in table:
            return handler(form, user)
    return Use("unknown", form.weight, user, reason=f"no rule for {user.target}")


def _same(form: _Form, user: fx.Node) -> _Form:
    before, after = fake_value(form.node).dtype, fake_value(user).dtype
    return _Form(form.weight, user, form.axes, form.plain and before == after)


def _swap(form: _Form, user: fx.Node) -> _Form:
    dims = len(form.axes)
    if user.target is aten.t.default:
        order = [1, 0]
    elif user.target is aten.permute.default:
        order = [int(dim) % dims for dim in arguments_of(user)[1]]
    else:
        order = list(range(dims))
        first, second = (int(dim) % dims for dim in arguments_of(user)[1:3])
        order[first], order[second] = order[second], order[first]
    return _Form(form.weight, user, tuple(form.axes[dim] for dim in order), form.plain)


def _expand(form: _Form, user: fx.Node) -> _Form:
    front = len(fake_value(user).shape) - len(form.axes)
    return _Form(form.weight, user, (None,) * front + form.axes, form.plain and not front)


def _reshape(form: _Form, user: fx.Node) -> _Form | Use:
    """A view that only adds and drops dimensions of size one."""
    before, after = fake_value(form.node).shape, fake_value(user).shape
    kept = [
        item
        for item in zip(form.axes, before, strict=True)
        if item[0] is not None or not same_size(item[1], 1)
    ]
    axes: list[int | None] = []
    for size in reversed(after):
        if kept and same_size(size, kept[-1][1]):
            axes.append(kept.pop()[0])
        elif isinstance(size, int) and size == 1:
            axes.append(None)
        else:
            break
    if kept or len(axes) != len(after):
        return Use("unknown", form.weight, user, reason="it is reshaped or sliced")
    axes.reverse()
    return _Form(form.weight, user, tuple(axes), form.plain and len(axes) == 2)


def same_size(a: Any, b: Any) -> bool:
    """Equal as ints or as symbols; never by a hint, which would add a guard."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.node.expr == b.node.expr


def _operands(user: fx.Node) -> tuple[Any, Any, Any]:
    """(bias, left, right) of a matrix product."""
    if user.target in (aten.addmm.default, aten.baddbmm.default):
        bias, left, right = arguments_of(user)[:3]
        return bias, left, right
    left, right = arguments_of(user)[:2]
    return None, left, right


def _product(form: _Form, user: fx.Node) -> Use:
    bias, left, right = _operands(user)
    if any(user.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return Use("unknown", form.weight, user, reason="a product with alpha or beta")
    if left is right or bias is form.node:
        return Use("unknown", form.weight, user, reason="multiplied by itself")
    if right is form.node and form.in_first:
        return Use("linear", form.weight, user, x=left, bias=bias, plain=form.plain)
    if left is form.node and form.out_first and bias is None:
        return Use("swapped", form.weight, user, x=right)
    return Use("unknown", form.weight, user, reason="a product with x W in place of x Wᵀ")


def _linear(form: _Form, user: fx.Node) -> Use:
    x, weight, *rest = arguments_of(user)
    if weight is not form.node or x is form.node or not form.out_first:
        return Use("unknown", form.weight, user, reason="a linear of Wᵀ")
    bias: Any = rest[0] if rest else user.kwargs.get("bias")
    return Use("linear", form.weight, user, x=x, bias=bias, plain=form.plain)


def _embedding(form: _Form, user: fx.Node) -> Use:
    if arguments_of(user)[0] is not form.node or not form.out_first:
        return Use("unknown", form.weight, user, reason="an embedding of Wᵀ")
    return Use("embedding", form.weight, user, x=arguments_of(user)[1], plain=form.plain)


_Handler = Callable[[_Form, fx.Node], "_Form | Use"]
_HANDLERS: tuple[tuple[frozenset[Any], _Handler], ...] = (
    (SAME_VALUE, _same),
    (frozenset({aten.t.default, aten.permute.default, aten.transpose.int}), _swap),
    (frozenset({aten.expand.default}), _expand),
    (RESHAPES, _reshape),
    (
        frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}),
        _product,
    ),
    (frozenset({aten.linear.default}), _linear),
    (frozenset({aten.embedding.default}), _embedding),
)


def origin_of(y: fx.Node, uses: dict[fx.Node, Use]) -> Use | None:
    """The use whose output `y` is, up to views, casts and the addition of a constant (the bias).

    A delta added to `y` is then the same as one added to the use's output.
    """
    node: Any = y
    while isinstance(node, fx.Node) and node not in uses:
        if node.target in SAME_VALUE or node.target in RESHAPES:
            node = arguments_of(node)[0]
        elif node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            left, right = arguments_of(node)
            if isinstance(right, fx.Node) and is_constant(right):
                node = left
            elif isinstance(left, fx.Node) and is_constant(left):
                node = right
            else:
                return None
        else:
            return None
    return uses.get(node) if isinstance(node, fx.Node) else None


def is_constant(node: fx.Node) -> bool:
    """True for a graph input seen through views and casts: a bias, not something computed."""
    while node.op == "call_function" and (node.target in SAME_VALUE or node.target in RESHAPES):
        if not isinstance(arguments_of(node)[0], fx.Node):
            return False
        node = arguments_of(node)[0]
    return node.op == "placeholder"


def depends_on(node: fx.Node, ancestors: set[fx.Node]) -> bool:
    """True where `node` is computed from one of `ancestors`."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in ancestors:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False
