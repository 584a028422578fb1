"""What an operator does to memory, by its schema; where schemas do not say it, in tables."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE
from lorafx.torch_internals.graph_parts import OpOverload

aten = torch.ops.aten


class Effect(enum.Enum):
    """What an operator does to memory."""

    VIEW = enum.auto()
    NEW = enum.auto()
    #: A tensor of undefined contents, which belong to nobody known.
    EMPTY = enum.auto()
    WRITE = enum.auto()
    #: Makes a tensor another view of its memory, which torch counts as a write.
    TURN = enum.auto()
    #: Writes rows of a paged cache, and returns new tensors.
    PAGES = enum.auto()
    #: Takes over a tensor that torch made of Python's numbers.
    LIFT = enum.auto()


#: Views, though their schemas do not say so.
_VIEWS = (aten._unsafe_view, aten._reshape_alias, aten.detach, aten.alias)
_EMPTY = (
    aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
    aten.empty_permuted,
)  # fmt: skip
_LIFTS = (aten.lift_fresh, aten.lift)
#: Their tensor may have other memory afterwards.
_OTHER_MEMORY = (aten.set_, aten.resize_, aten.resize_as_)
#: Parts of a tensor's memory of which torch counts the writes apart.
PARTS = (aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk)
#: Sums over ranks in place: rows keep their owners.
SUMS = (torch.ops.c10d.allreduce_,) if dist.is_available() else ()
#: Operators whose result ignores the old contents.
OVERWRITING = (
    aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_, aten.uniform_, aten.normal_,
    aten.exponential_, aten.random_, aten.geometric_, aten.log_normal_, aten.cauchy_,
)  # fmt: skip


@cache
def effect_of(func: Any) -> Effect | None:
    """None for what is no operator with a schema, such as control flow."""
    if not isinstance(func, OpOverload):
        return None
    if func.overloadpacket in _LIFTS:
        return Effect.LIFT
    if func in (PAGED_CACHE, PAGED_ATTENTION):
        return Effect.PAGES
    if torch.Tag.inplace_view in func.tags and func.overloadpacket not in _OTHER_MEMORY:
        return Effect.TURN
    if func._schema.is_mutable:
        return Effect.WRITE
    aliases = any(value.alias_info is not None for value in func._schema.returns)
    if aliases or func.overloadpacket in _VIEWS:
        return Effect.VIEW
    return Effect.EMPTY if func.overloadpacket in _EMPTY else Effect.NEW


def tensors_in(values: object) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def arguments_by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator, without those that are left out."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def written(func: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the operator writes into."""
    tensors: list[Tensor] = []
    for position, name in _written_arguments(func):
        value = kwargs.get(name, args[position] if position < len(args) else None)
        tensors.extend(tensors_in(value))
    return tensors


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def functional(func: Any) -> Any:
    """The out-of-place form of an operator, which takes the same arguments except `out`."""
    if not func._schema.is_mutable:
        return func
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
    twin = getattr(aten, name.removesuffix("_"), None)  # torch's convention for in-place names
    same = getattr(twin, func._overloadname, func)
    if not same._schema.is_mutable:
        return same
    taken = [(a.name, str(a.type)) for a in func._schema.arguments if not is_out(a)]
    forms = [getattr(func.overloadpacket, form) for form in func.overloadpacket.overloads()]
    for form in forms:
        arguments = [(a.name, str(a.type)) for a in form._schema.arguments]
        if arguments == taken and not form._schema.is_mutable:
            return form
    return func


def is_out(argument: Any) -> bool:
    return argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write


@contextmanager
def graph_of_call(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: object
) -> Iterator[tuple[fx.Node, Mapping[int, fx.Node]]]:
    """An operator's call with real tensors as the node of a graph, whose rules read it; and the
    nodes of its operands, by the identities of these."""
    graph, operands = fx.Graph(), dict[int, fx.Node]()

    def node_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in operands:
            operands[id(value)] = graph.placeholder(f"x{len(operands)}")
            operands[id(value)].meta["val"] = value
        return operands[id(value)]

    positional, named = map_aggregate(args, node_of), map_aggregate(dict(kwargs), node_of)
    node = graph.call_function(func, positional, named)
    node.meta["val"] = results
    try:
        yield node, operands
    finally:
        for item in graph.nodes:  # they refer to one another, and would keep the tensors
            item.meta.clear()
