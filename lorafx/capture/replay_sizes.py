"""Sizes of what each layer has for itself, such as its part of a cache, as symbols.

    traced     keys [s0, 2, s1, 16] and the new ones [s2, 2, 1, 16] give [s2, 2, s1 + 1, 16]
    replayed   keys [s3, 2, s4, 16] and the new ones [s2, 2, 1, 16] give [s2, 2, s4 + 1, 16]

Where both layers' symbols have equal values now, and what was found out about the traced layer's is
found out about the other's, a trace of the other one gives the same with its own symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lorafx.capture.replay_arguments import NotAlike
from lorafx.capture.replay_guards import Guards
from lorafx.kernels.ops.stamp_op import Layout


class LayerSizes:
    """The symbols that come with a layer, and what is found out about them while it is traced."""

    def __init__(self, tx: Any) -> None:
        self.environment = tx.output.shape_env
        self._known = dict(self.environment.replacements), set(self.environment.backed_var_to_val)
        self._before = len(self.environment.guards)
        self.own: set[sympy.Symbol] = set()
        #: What was found out about them, and how much there was of it before each operator.
        self.found: list[tuple[int, Any]] = []
        self.before: Mapping[fx.Node, int] = {}

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
        for place, guard in enumerate(self.environment.guards):
            if place >= self._before and guard.expr.free_symbols & self.own:
                self.found.append((place, guard.expr))
        self.before = {node: at[node] for node in operators if node in at}
        if len(self.before) != len(operators):
            raise NotAlike("an operator was added in another way")
        for node in operators:
            for value in pytree.tree_leaves(node.meta.get("example_value")):
                if self.concern(value) and not _can_be_made(value):
                    raise NotAlike(f"{node.name} has a value that is no plain tensor")

    def source(self, symbol: sympy.Symbol) -> Source:
        """How one of the symbols is reached."""
        sources = self.environment.var_to_sources.get(symbol)
        if not sources:
            raise NotAlike(f"{symbol} has no source")
        found: Source = sources[0]
        return found

    def concern(self, value: Any) -> bool:
        """Whether one of the symbols is in a value of a node."""
        return bool(self.own) and any(
            isinstance(each, sympy.Basic) and each.free_symbols & self.own
            for each in _raw_sizes(value)
        )

    def renamed(self) -> Renamed:
        return Renamed(self)


class Renamed:
    """The symbols of another layer in place of the traced one's."""

    def __init__(self, sizes: LayerSizes) -> None:
        self._sizes, self._environment = sizes, sizes.environment
        self._found = list(reversed(sizes.found))
        self._known = set(self._environment.backed_var_to_val)
        self._names: dict[Any, Any] = {}
        self._pairs: list[tuple[Any, Any]] = []

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
            self._names = {each: sources.get(moved(self._sizes.source(each))) for each in own}
            if len(made) != len(own) or set(self._names.values()) != made:
                raise NotAlike("there are other sizes")
            if any(values[each] != values[other] for each, other in self._names.items()):
                raise NotAlike("a size has another value")
        for one, other in self._pairs:
            mine, theirs = _raw_sizes(one), _raw_sizes(other)
            if mine != theirs and [*map(self._named, mine)] != [*map(sympy.sympify, theirs)]:
                raise NotAlike("an input is laid out in another way")

    def _named(self, expression: Any) -> Any:
        return sympy.sympify(expression).xreplace(self._names)

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

    def value(self, value: Any, mode: Any) -> Any:
        """What a node of the other layer has where one of the traced layer has `value`."""
        if isinstance(value, (list, tuple)):
            if not any(map(self._sizes.concern, pytree.tree_leaves(value))):
                return value
            items = [self.value(each, mode) for each in value]
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
        found = self._named(size.node._expr)
        return self._environment.create_symintnode(found, hint=size.node.hint)


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
