"""Sizes of what each layer has for itself, such as its part of a cache, as symbols.

    traced     keys [s0, 2, s1, 16] and the new ones [s2, 2, 1, 16] give [s2, 2, s1 + 1, 16]
    replayed   keys [s3, 2, s4, 16] and the new ones [s2, 2, 1, 16] give [s2, 2, s4 + 1, 16]

Where both layers' symbols have equal values now, and what was found out about the traced layer's is
found out about the other's, a trace of the other one gives the same with its own symbols.

A symbol of the traced layer may have become a number meanwhile, or one that was there before: the
first layer's s0, say. The other layer's size is made as that at once. Its guard is the same one,
for Dynamo guards what an input's sizes are in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    StatefulSymbolicContext,
    StrictMinMaxConstraint,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, make_symbol

from lorafx.capture.replay_arguments import NotAlike, same_layout
from lorafx.capture.replay_guards import Guards, Moved
from lorafx.kernels.ops.stamp_op import Layout


class LayerSizes:
    """The symbols that come with a layer, and what is found out about them while it is traced."""

    def __init__(self, tx: Any) -> None:
        self.environment = tx.output.shape_env
        self._known = dict(self.environment.replacements), set(self.environment.backed_var_to_val)
        self._before = len(self.environment.guards)
        self.own: set[sympy.Symbol] = set()
        #: What tensors' sizes among them have become: numbers, and symbols that were there before.
        self.settled: dict[sympy.Symbol, sympy.Basic] = {}
        #: What was found out about them, and how much there was of it before each operator.
        self.found: list[tuple[int, Any]] = []
        #: What of it is about others than the settled ones.
        self.open: list[tuple[int, Any]] = []
        self.before: Mapping[fx.Node, int] = {}
        #: Operators with a value that one of the symbols is in.
        self.concerned: set[fx.Node] = set()
        #: Values of such operators that are the same for each layer.
        self.alike: dict[fx.Node, Any] = {}

    def end(
        self, guards: Guards, operators: Collection[fx.Node], at: Mapping[fx.Node, int]
    ) -> None:
        """The layer has been traced. `at` tells how much had been found out about any symbols when
        an operator was added.

        Raises:
            NotAlike: a symbol is not of what the layer has for itself, or what was there before has
                become one of them, or one is in a value that cannot be made anew.
        """
        replacements, known = self._known
        self.own = set(self.environment.backed_var_to_val) - known
        if not all(map(guards.concerns, map(self.source, self.own))):
            raise NotAlike("there are sizes of another origin")
        if not self.own:
            return
        now = self.environment.replacements
        if any(now.get(each) != replacements.get(each) for each in known):
            raise NotAlike("a size that was there before has become one of the layer's")
        self.settled = self._settled(operators)
        for place, guard in enumerate(self.environment.guards):
            if place >= self._before and guard.expr.free_symbols & self.own:
                self.found.append((place, guard.expr))
        self.open = [
            (place, each)
            for place, each in self.found
            if each.xreplace(self.settled) is not sympy.true
        ]
        self.before = {node: at[node] for node in operators if node in at}
        if len(self.before) != len(operators):
            raise NotAlike("an operator was added in another way")
        for node in operators:
            for value in pytree.tree_leaves(node.meta.get("example_value")):
                if not self.concern(value):
                    continue
                if not _can_be_made(value):
                    raise NotAlike(f"{node.name} has a value that is no plain tensor")
                self.concerned.add(node)

    def _settled(self, operators: Collection[fx.Node]) -> dict[sympy.Symbol, sympy.Basic]:
        """What sizes of the layer's tensors have become. An input that is such a size may be read
        as a symbol of its own."""
        # Torch 2.11 has no such counter. There a layer of a cache that grows would have other sizes
        # than the rest, and would not be outlined with them.
        known_to_fit = hasattr(self.environment, "_replacements_version_counter")
        if self.environment.should_record_events or not known_to_fit:
            return {}
        taken = {item for node in operators for item in node.all_input_nodes}
        read = {
            symbol
            for item in taken
            if item.op == "placeholder" and isinstance(item.meta.get("example_value"), torch.SymInt)
            for symbol in item.meta["example_value"].node._expr.free_symbols
        }
        found = {}
        for each in self.own - read:
            now = self.environment.replace(each)
            known = isinstance(now, sympy.Integer) or now in self._known[1]
            if known and _is_size(self.source(each)):
                found[each] = now
        return found

    def source(self, symbol: sympy.Symbol) -> Source:
        """How one of the symbols is reached."""
        sources = self.environment.var_to_sources.get(symbol)
        if not sources:
            raise NotAlike(f"{symbol} has no source")
        found: Source = sources[0]
        return found

    def is_settled(self, node: fx.Node) -> bool:
        """Whether an input of the layer is a size that is known to be something else."""
        return not _symbols(node.meta["example_value"]).isdisjoint(self.settled)

    def concern(self, value: Any) -> bool:
        """Whether one of the symbols is in a value of a node."""
        return not self.own.isdisjoint(_symbols(value))

    def only_settled(self, value: Any) -> bool:
        """Whether the symbols in a value are none that each layer has for itself."""
        left = self.own - self.settled.keys()
        return all(map(left.isdisjoint, map(_symbols, pytree.tree_leaves(value))))

    def renamed(self) -> Renamed:
        return Renamed(self)


class Renamed:
    """The symbols of another layer in place of the traced one's."""

    def __init__(self, sizes: LayerSizes) -> None:
        self._sizes, self._environment = sizes, sizes.environment
        self._found: list[tuple[int, Any]] = []
        self._known = set(self._environment.backed_var_to_val)
        self._names: dict[Any, Any] = {}
        self._pairs: list[tuple[Any, Any]] = []
        #: By expressions of the traced layer.
        self._expressions: dict[Any, Any] = {}
        self._sizes_made: dict[Any, Any] = {}
        #: By the traced layer's symbols what no symbol was made for.
        self._settled: dict[sympy.Symbol, sympy.Basic] = {}

    def check(self, moved: Moved) -> None:
        """Raise NotAlike where a tensor is laid out in another way than the traced layer's, whose
        sizes are known to be numbers, or what was there before."""
        values = self._environment.backed_var_to_val
        tensors: dict[Source, Tensor] = {}
        for symbol in self._sizes.settled:
            size: Any = self._sizes.source(symbol)
            if size.base not in tensors:
                tensors[size.base] = moved.now(size.base)
                if not same_layout(moved.before(size.base), tensors[size.base]):
                    raise NotAlike(f"{size.base.name} is laid out in another way")
            if tensors[size.base].size(size.idx) != values[symbol]:
                raise NotAlike(f"{size.name} has another value")

    @contextmanager
    def settled(self, moved: Callable[[Source], Source]) -> Iterator[None]:
        """Inside, no symbols are made for sizes of tensors, which have been checked, that are known
        to be numbers, or what was there before. `moved` as `end` takes it."""
        environment = self._environment
        if not self._sizes.settled:
            yield
            return
        symbols = {moved(self._sizes.source(symbol)): symbol for symbol in self._sizes.settled}
        create = environment.create_symbol

        def created(
            value: Any,
            source: Source,
            dynamic_dim: DimDynamic = DimDynamic.DUCK,
            constraint_dim: Any = None,
            *args: Any,
            **named: Any,
        ) -> Any:
            symbol = symbols.get(source)
            dynamic = dynamic_dim in (DimDynamic.DUCK, DimDynamic.DYNAMIC)
            strict = isinstance(constraint_dim, StrictMinMaxConstraint)
            now = self._stands(symbol, source) if symbol and dynamic and not strict else None
            if symbol is None or now is None:
                return create(value, source, dynamic_dim, constraint_dim, *args, **named)
            self._settled[symbol] = now
            # The rest is what the environment does where equal sizes are one symbol.
            if isinstance(now, sympy.Symbol):
                environment.source_to_var[source.name] = now
                environment.var_to_sources[now].append(source)
            context = named.get("symbolic_context")
            if isinstance(context, StatefulSymbolicContext):
                known = context.shape_env_to_source_to_symbol_cache
                known.setdefault(id(environment), {})[source.name] = now
            return now

        environment.create_symbol = created
        try:
            yield
        finally:
            del environment.create_symbol

    def _stands(self, symbol: sympy.Symbol, source: Source) -> sympy.Basic | None:
        """What stands for a size in place of a symbol of its own; None where that one would stand
        for the others: of equal symbols it is the first one by name."""
        now: sympy.Basic = self._environment.replace(self._sizes.settled[symbol])
        number = self._environment._generate_unique_id(source.name)  # what follows has its names
        if isinstance(now, sympy.Symbol):
            if now.name < make_symbol(SymT.SIZE, number).name:
                return now
        elif isinstance(now, sympy.Integer):
            return now
        self._environment.unique_ids.discard(number)
        return None

    def is_settled(self, node: fx.Node) -> bool:
        return self._sizes.is_settled(node)

    def pair(self, one: Any, other: Any) -> None:
        """`one` is the value of an input of the traced layer, `other` of the other layer's."""
        self._pairs.append((one, other))

    def end(self, moved: Callable[[Source], Source]) -> None:
        """All inputs are there. `moved` tells how the other layer reaches what the traced one has.

        Raises:
            NotAlike: they bring other symbols with them, or are laid out in another way.
        """
        values = self._environment.backed_var_to_val
        if own := self._sizes.own:
            made = set(values) - self._known
            sources = {self._sizes.source(each): each for each in made}
            left = own - self._settled.keys()
            names = {each: sources.get(moved(self._sizes.source(each))) for each in left}
            if len(made) != len(left) or set(names.values()) != made:
                raise NotAlike("there are other sizes")
            if any(values[each] != values[other] for each, other in names.items()):
                raise NotAlike("a size has another value")
            self._names = {**self._settled, **names}
        self._found = [*reversed(self._sizes.open if self._are_settled() else self._sizes.found)]
        for one, other in self._pairs:
            mine, theirs = _raw_sizes(one), _raw_sizes(other)
            if mine != theirs and [*map(self._named, mine)] != [*map(sympy.sympify, theirs)]:
                raise NotAlike("an input is laid out in another way")

    def _are_settled(self) -> bool:
        return len(self._settled) == len(self._sizes.settled)

    def _named(self, expression: Any) -> Any:
        found = self._expressions.get(expression)
        if found is None:
            found = self._expressions[expression] = sympy.sympify(expression).xreplace(self._names)
        return found

    def reach(self, node: fx.Node | None) -> None:
        """Find out about the symbols what had been found out about the traced layer's before this
        operator of it was added, or before its end."""
        until = None if node is None else self._sizes.before.get(node, 0)
        while self._found and (until is None or self._found[-1][0] < until):
            expression = self._named(self._found.pop()[1])
            if expression is sympy.true:
                continue
            if not self._environment.create_symboolnode(expression):
                raise RuntimeError(f"{expression} is not so")  # all have the values that those had

    def value(self, node: fx.Node, mode: Any) -> Any:
        """What a node of the other layer has where this one of the traced layer has its value."""
        sizes, value = self._sizes, node.meta["example_value"]
        if node not in sizes.concerned:
            return value
        alike = self._are_settled()
        if alike and node in sizes.alike:
            return sizes.alike[node]
        found = self._value(value, mode)
        if alike and sizes.only_settled(value):
            sizes.alike[node] = found
        return found

    def _value(self, value: Any, mode: Any) -> Any:
        if isinstance(value, (list, tuple)):
            items = [self._value(each, mode) for each in value]
            return torch.Size(items) if isinstance(value, torch.Size) else type(value)(items)
        if not self._sizes.concern(value):
            return value
        if not isinstance(value, Tensor):
            return self._size(value)
        layout = Layout.of(value)
        shape, strides = (tuple(map(self._size, each)) for each in layout[:2])
        return layout._replace(shape=shape, strides=strides).empty(mode)

    def _size(self, size: Any) -> Any:
        if isinstance(size, torch.SymBool):
            return self._environment.create_symboolnode(self._named(size.node._expr))
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node._expr
        found = self._sizes_made.get(expression)
        if found is None:
            named, hint = self._named(expression), size.node.hint
            found = self._environment.create_symintnode(named, hint=hint)
            self._sizes_made[expression] = found
        return found


def _numbers(value: Any) -> tuple[Any, ...]:
    """Sizes, strides and the offset of a tensor; a number itself."""
    if isinstance(value, Tensor):
        strided = value.layout is torch.strided
        return (
            *value.shape,
            *(value.stride() if strided else ()),
            *((value.storage_offset(),) if strided else ()),
        )
    return (value,) if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat) else ()


def _raw_sizes(value: Any) -> list[Any]:
    """A value's numbers as they were when it was made, before symbols became other ones."""
    return [each.node._expr if hasattr(each, "node") else each for each in _numbers(value)]


def _symbols(value: Any) -> set[sympy.Symbol]:
    """The symbols in a value's numbers."""
    found = (each.free_symbols for each in _raw_sizes(value) if isinstance(each, sympy.Basic))
    return set().union(*found)


def _is_size(source: Source) -> bool:
    return isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE


def _can_be_made(value: Any) -> bool:
    if isinstance(value, Tensor):
        plain = isinstance(value, FakeTensor) and value.layout is torch.strided
        offset = value.storage_offset() if plain else None
        return (
            isinstance(offset, int)
            and offset == 0
            and not (value.requires_grad or value.is_conj() or value.is_neg())
        )
    return isinstance(value, (torch.SymInt, torch.SymBool))
