"""The arguments of a graph's calls of operators, read and written by the names in their schemas.

    site(x, y, A, B, …, rows)    bound(node)["rows"]    rebind(node, rows=4)

All ops use the same name for an argument, so a call of another op needs only what differs:
`in_order(FUSED, bound(site), weight=w, bias=b, transposed=False)`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from lorafx.torch_internals.graph_parts import OpOverload, OpOverloadPacket

#: Calls the op that is its first argument, and that writes into some of the others.
AUTO_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized

#: AOTAutograd's form of an operator that writes, with the bases of its operands as arguments.
TRACED_WRITE = torch.ops.higher_order.auto_functionalized_v2


def op_of(node: fx.Node) -> Any:
    """The op that `node` calls, directly or by `auto_functionalized`, if it writes in place."""
    return node.args[0] if node.target is AUTO_FUNCTIONALIZED else node.target


class _Argument(NamedTuple):
    name: str
    optional: bool
    default: Any


@functools.cache
def _arguments(op: OpOverload | OpOverloadPacket) -> tuple[_Argument, ...]:
    op = op.default if isinstance(op, OpOverloadPacket) else op
    return tuple(
        _Argument(item.name, item.has_default_value(), item.default_value)
        for item in op._schema.arguments
    )


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by their names in its schema, with defaults."""
    op, kwargs = op_of(node), node.kwargs
    positional = node.args if op is node.target else node.args[1:]
    values: dict[str, Any] = {}
    for i, (name, optional, default) in enumerate(_arguments(op)):
        if i < len(positional):
            values[name] = positional[i]
        elif name in kwargs:
            values[name] = kwargs[name]
        elif optional:
            values[name] = default
    return values


def operand(node: fx.Node) -> Any:
    """The first argument of a call."""
    if node.args and node.target is not AUTO_FUNCTIONALIZED:
        return node.args[0]
    return next(iter(bound(node).values()))


def index_of(node: fx.Node) -> Any:
    """The index in a call of `operator.getitem`, which has no schema."""
    return node.args[1]


def in_order(op: OpOverload, values: Mapping[str, Any], **others: Any) -> tuple[Any, ...]:
    """The positional arguments of a call of `op`, without defaults at the end: `others`, and those
    in `values`, which may be another op's. KeyError for missing or unknown ones."""
    arguments = _arguments(op)
    if unknown := others.keys() - {argument.name for argument in arguments}:
        raise KeyError(f"{op} takes no {', '.join(sorted(unknown))}")
    values = {**values, **others}
    positional: list[Any] = []
    needed = 0
    for name, optional, default in arguments:
        value = values.get(name, default) if optional else values[name]
        positional.append(value)
        is_default = value is default or (not isinstance(value, fx.Node) and value == default)
        needed = needed if optional and is_default else len(positional)
    return tuple(positional[:needed])


def rebind(node: fx.Node, **values: Any) -> None:
    """Replace the arguments of these names. Raises KeyError for an unknown name."""
    node.args, node.kwargs = in_order(node.target, bound(node), **values), {}  # type: ignore[arg-type]


def is_view(node: fx.Node) -> bool:
    """Whether by its schema the result may share its operand's memory."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(operand(node))
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(item.alias_info is not None for item in schema.returns)


def base_of(item: Any) -> Any:
    """The node at the beginning of a chain of views."""
    while isinstance(item, fx.Node) and is_view(item) and isinstance(operand(item), fx.Node):
        item = operand(item)
    return item
