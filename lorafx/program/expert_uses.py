"""Products with the weights of routed experts in an ATen graph.

    sorted     y = grouped_mm(x, W, offs)    rows sorted by expert, offs (E,) where each one's end
    chosen     y = bmm(x, W[ids])            a weight gathered for each row
    all        y = bmm(x, W)                 every expert multiplies its rows, x (E, T, K)

W (E, N, K), or (E, K, N) if stored transposed, seen through casts and transposes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.op_arguments import bound
from lorafx.ownership.indexing import is_boolean
from lorafx.program.frame import fake_value
from lorafx.program.weight_uses import SAME_VALUE, order_of

aten = torch.ops.aten

ExpertUseKind = Literal["sorted", "chosen", "all", "unknown"]
GROUPED = frozenset({aten._grouped_mm.default})
SWAPS = frozenset({aten.transpose.int, aten.permute.default})
#: transformers' op, where torch's cannot be compiled: (namespace, name).
FALLBACK = ("transformers", "grouped_mm_fallback")


@dataclass(frozen=True)
class ExpertUse:
    """A product with the weights of all experts; `kind` as in the module's equations, or "unknown"
    for a `reason`. `choice` is offs or ids. `swapped`: y is (rows, N, 1), x (rows, K, 1)."""

    kind: ExpertUseKind
    weight: fx.Node
    node: fx.Node
    x: fx.Node | None = None
    choice: fx.Node | None = None
    swapped: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _Form:
    """`node` is W, or W[ids], with (in, out) as its last dimensions if `in_first`."""

    node: fx.Node
    in_first: bool
    ids: fx.Node | None = None


def expert_uses(weight: fx.Node, *, transposed: bool) -> list[ExpertUse]:
    """All uses of the 3-D `weight`; `transposed` if stored (E, K, N)."""
    found: list[ExpertUse] = []
    pending = [_Form(weight, transposed)]
    while pending:
        form = pending.pop()
        for user in list(form.node.users):
            outcome = _interpret(weight, form, user)
            if isinstance(outcome, _Form):
                pending.append(outcome)
            elif outcome is not None:
                found.append(outcome)
    return found


def _interpret(weight: fx.Node, form: _Form, user: fx.Node) -> _Form | ExpertUse | None:
    def unknown(reason: str) -> ExpertUse:
        return ExpertUse("unknown", weight, user, reason=reason)

    if user.op == "output":
        return unknown("the weight itself is returned")
    value = fake_value(user)
    if value is None or isinstance(value, (int, torch.SymInt)):
        return None
    if user.target in SAME_VALUE:
        return _Form(user, form.in_first, form.ids)
    if user.target in SWAPS:
        order = order_of(user, 3)
        if order == [0, 1, 2]:
            return _Form(user, form.in_first, form.ids)
        if order == [0, 2, 1]:
            return _Form(user, not form.in_first, form.ids)
        return unknown("its dimensions are permuted")
    if user.target is aten.index.Tensor and form.ids is None:
        given = bound(user)["indices"]
        indices = [index for index in given if index is not None]
        first = len(indices) == 1 and given[0] is indices[0]
        if first and fake_value(indices[0]).dim() == 1 and not is_boolean(indices[0]):
            return _Form(user, form.in_first, indices[0])
        return unknown("it is not indexed by one expert per row")
    if is_grouped(user):
        x, held, offs, _ = grouped(user)
        if held is form.node and form.in_first and form.ids is None and offs is not None:
            return ExpertUse("sorted", weight, user, x, offs)
        return unknown("a grouped product with x W in place of x Wᵀ")
    if user.target is aten.bmm.default:
        return _batched(weight, form, user, unknown)
    return unknown(f"no rule for {user.target}")


def _batched(weight: fx.Node, form: _Form, user: fx.Node, unknown: Any) -> ExpertUse:
    call = bound(user)
    left, right = call["self"], call["mat2"]
    kind: ExpertUseKind = "all" if form.ids is None else "chosen"
    fits = right is form.node and left is not form.node and form.in_first
    if fits and (kind == "all" or _is_one(fake_value(left).shape[1])):
        return ExpertUse(kind, weight, user, left, form.ids)
    swapped = left is form.node and right is not form.node and not form.in_first
    if swapped and kind == "chosen" and _is_one(fake_value(right).shape[2]):
        return ExpertUse(kind, weight, user, right, form.ids, swapped=True)
    return unknown("a product with x W in place of x Wᵀ")


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


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
