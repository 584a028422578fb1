"""Arguments and results of a call that Dynamo traces, as far as the trace follows from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorafx.ownership.memory import storage_of


class NotAlike(Exception):
    """Two calls are not known to be traced alike."""


def same_constant(one: Any, other: Any) -> bool:
    """Whether two constants are equal, signs of zeros and types included."""
    return type(one) is type(other) and one == other and repr(one) == repr(other)


def same_layout(one: Any, other: Any, *, sizes: bool = True) -> bool:
    """Whether operators see no difference between two tensors without data, or none but sizes."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if is_traceable_wrapper_subclass(one) or is_traceable_wrapper_subclass(other):
        return False  # what is inside of it counts too
    return _kind(one) == _kind(other) and not (sizes and _sizes(one) != _sizes(other))


def _sizes(value: Tensor) -> tuple[Any, ...]:
    strided = value.layout is torch.strided
    return (
        tuple(map(_size, value.shape)),
        tuple(map(_size, value.stride())) if strided else None,
        _size(value.storage_offset()) if strided else None,
    )


def _kind(value: Tensor) -> tuple[Any, ...]:
    return (
        type(value),
        isinstance(value, nn.Parameter),
        value.dim(),
        value.layout,
        value.dtype,
        value.device,
        value.requires_grad,
        value.is_inference(),
        value.is_conj(),
        value.is_neg(),
    )


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else size


def plain(variable: Any) -> Any:
    """The variable that one of Dynamo's has become; it itself while nobody has looked at it."""
    return variable.unwrap() if isinstance(variable, LazyVariableTracker) else variable


def reachable(args: Any, kwargs: Any, effects: Any) -> dict[int, Any]:
    """What a call may change that was there before it, by identity."""
    found = {id(item): item for item in effects.id_to_variable.values()}

    def visit(item: Any) -> None:
        found[id(item)] = item

    for value in (list(args), dict(kwargs), list(effects.store_attr_mutations.values())):
        VariableTracker.visit(visit, value)
    return found


class Arguments:
    """Arguments of a call, flat, by where they stand."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.values: dict[tuple[Any, ...], Any] = {}
        for place, value in enumerate(args):
            self._add((place,), value)
        for name, value in kwargs.items():
            self._add((name,), value)

    def _add(self, place: tuple[Any, ...], value: Any) -> None:
        value = plain(value)
        self.values[place] = value
        if isinstance(value, (TupleVariable, ListVariable)):
            for index, item in enumerate(value.items):
                self._add((*place, index), item)
        elif isinstance(value, ConstDictVariable):
            for index, (key, item) in enumerate(value.items.items()):
                self._add((*place, index, "key"), key.vt)
                self._add((*place, index), item)

    def paired(self, args: Any, kwargs: Any) -> tuple[dict[fx.Node, fx.Node], dict[Any, Any]]:
        """By the nodes and the variables of these arguments those of another call's.

        Raises:
            NotAlike: a trace of that call may be another.
        """
        others = Arguments(args, kwargs).values
        nodes: dict[fx.Node, fx.Node] = {}
        back: dict[fx.Node, fx.Node] = {}
        variables: dict[Any, Any] = {}
        unread = {place for place, one in self.values.items() if _unread(one)}
        rest = {place for place in others if not any(place[: len(p)] == p for p in unread)}
        if rest != self.values.keys() - unread or len(args) + len(kwargs) != self._count():
            raise NotAlike("other arguments")
        for place in rest:
            one, other = self.values[place], others[place]
            if isinstance(other, LazyVariableTracker):
                other = other.realize()
            if type(one) is not type(other):
                raise NotAlike(f"argument {place} is of another kind")
            variables[one] = other
            if isinstance(one, (TensorVariable, SymNodeVariable)):
                a, b = one.as_proxy().node, other.as_proxy().node
                if nodes.setdefault(a, b) is not b or back.setdefault(b, a) is not a:
                    raise NotAlike(f"argument {place} is also another one")
                _check_values(place, a, b)
            elif isinstance(one, ConstantVariable):
                if not same_constant(one.as_python_constant(), other.as_python_constant()):
                    raise NotAlike(f"argument {place} has another value")
            elif isinstance(one, (TupleVariable, ListVariable, ConstDictVariable)):
                if type(one.mutation_type) is not type(other.mutation_type):
                    raise NotAlike(f"argument {place} is from somewhere else")
            elif one.source != other.source or (one.source is None and not _same(one, other)):
                raise NotAlike(f"argument {place} is another object")
        return nodes, variables

    def _count(self) -> int:
        return sum(len(place) == 1 for place in self.values)


def _same(one: Any, other: Any) -> bool:
    """Whether two are one object that was made in the frame."""
    return one is other and isinstance(one, UserDefinedObjectVariable)


def _unread(variable: Any) -> bool:
    return isinstance(variable, LazyVariableTracker)


def _check_values(place: Any, a: fx.Node, b: fx.Node) -> None:
    """Raise NotAlike where two arguments differ in more than their numbers."""
    if a is b:
        return
    if "placeholder" in (a.op, b.op):  # it may be read as something else too
        raise NotAlike(f"argument {place} is an input of the graph")
    one, other = a.meta["example_value"], b.meta["example_value"]
    same = same_layout if isinstance(one, Tensor) else _same_size
    if not same(one, other):
        raise NotAlike(f"argument {place} is laid out in another way")


def _same_size(one: Any, other: Any) -> bool:
    return type(one) is type(other) and _size(one) == _size(other)


def results_of(
    results: Iterable[Any], made: set[fx.Node], arguments: Arguments, inputs: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """The tensors and sizes that a call returns or stores, by their nodes; `inputs` are its own
    graph inputs.

    Raises:
        NotAlike: it returns something else than new tensors, its own arguments, constants, and
            tuples and lists of them.
    """
    found: dict[fx.Node, Any] = {}
    given = {id(one): one for one in arguments.values.values()}
    taken = {storage_of(_value(one)) for one in given.values() if isinstance(one, TensorVariable)}
    values = (node.meta["example_value"] for node in inputs)
    own = {storage_of(value) for value in values if isinstance(value, Tensor)}

    def look(item: Any) -> None:
        item = plain(item)
        if id(item) in given or item in found.values():
            return
        if isinstance(item, LazyVariableTracker):  # looking at it would guard it
            raise NotAlike("a result was not looked at")
        if isinstance(item, (TupleVariable, ListVariable)):
            for part in item.items:
                look(part)
        elif type(item) is TensorVariable:
            node, place = item.as_proxy().node, storage_of(_value(item))
            view = place in own and not inputs_alone(node, inputs)
            if node not in made or place is None or place in taken or view:
                raise NotAlike("a result is no new tensor")
            if found.setdefault(node, item) is not item:
                raise NotAlike("a result is another one too")
            taken.add(place)
        elif isinstance(item, SymNodeVariable):
            node = item.as_proxy().node
            if node in inputs or (node in made and found.setdefault(node, item) is not item):
                raise NotAlike("a result is a size of the layer's own")
        elif not isinstance(item, ConstantVariable):
            raise NotAlike(f"the result {item}")
        if item.source is not None:
            raise NotAlike("a result was there before")

    for result in results:
        look(result)
    return found


def inputs_alone(node: fx.Node, inputs: Collection[fx.Node]) -> bool:
    """Whether an operator takes nothing but these inputs."""
    return all(item in inputs for item in node.all_input_nodes)


def _value(variable: Any) -> Any:
    return variable.as_proxy().node.meta["example_value"]


def replayed_result(result: Any, variables: Mapping[Any, Any]) -> Any:
    """The result of another call, by what arguments and tensors of the traced one are in it."""
    result = plain(result)
    if result in variables:
        return variables[result]
    if isinstance(result, (TupleVariable, ListVariable)):
        items = [replayed_result(item, variables) for item in result.items]
        kind: Any = type(result.mutation_type)
        return result.clone(items=items, mutation_type=kind())  # None too
    return result
