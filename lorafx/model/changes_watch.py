"""What changed on a model after it was marked: replaced modules, and hooks of others.

    model ──name──▶ layer ──name──▶ site      each of these edges leads to the very same module

A mark hangs on a module, and an adapter's factors belong to a path: were another module to take
that path, the delta would be lost. Each call compares the edges, without a walk over the tree.

Dynamo guards on nothing of a module without forward hooks, so graphs do not notice later hooks.
torch numbers the hooks of a process, so a call compares one number.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from lorafx.errors import ReplacedModuleError, some
from lorafx.model.marks import MARKS
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.sites import Site
from lorafx.registry import lookup

_CHILDREN = operator.attrgetter("_modules")


class Edge(NamedTuple):
    """A module that an attribute of another held when the model was marked."""

    path: str
    parent: nn.Module
    name: str
    child: nn.Module

    @property
    def now(self) -> nn.Module | None:
        return self.parent._modules.get(self.name)


class SiteWatch:
    """The edges that lead to the sites of one model. `missing` are paths that some edge no longer
    led to at the last look; `state` is 0 without any, else a number for what stands there."""

    def __init__(self, graph: ModuleGraph, sites: Sequence[Site]) -> None:
        self._root = graph.root
        above = graph.ancestors(site.marked for site in sites)
        self._edges = [
            Edge(join(path, name), module, name, child)
            for path, module in graph.modules()
            if id(module) in above
            for name, child in module._modules.items()
            if child is not None and id(child) in above
        ]
        self._sites = tuple(sites)
        self._broken: list[Edge] = []
        #: Each lost edge by identity, with the module that stands there.
        self._found: list[tuple[int, nn.Module | None]] = []
        self._states = itertools.count(1)
        self.missing: frozenset[str] = frozenset()
        self.state = 0
        self._parents = [edge.parent for edge in self._edges]
        self._names = [edge.name for edge in self._edges]
        self._children = [edge.child for edge in self._edges]

    def look(self) -> bool:
        """Look at every edge; whether anything changed since the last look."""
        broken = [edge for edge in self._edges if edge.now is not edge.child]
        found = [(id(edge), edge.now) for edge in broken]
        same = len(found) == len(self._found) and all(
            key == other and module is known
            for (key, module), (other, known) in zip(found, self._found, strict=True)
        )
        if same:
            return False
        self._broken, self._found = broken, found
        self.missing = frozenset(site.path for site in self._below(broken))
        self.state = next(self._states) if broken else 0
        return True

    @property
    def in_doubt(self) -> bool:
        """Whether only a look can tell what is missing. Compared in C: every call asks."""
        now = map(dict.get, map(_CHILDREN, self._parents), self._names)
        return bool(self.missing) or not all(map(operator.is_, now, self._children))

    def refuse(self, paths: Collection[str] | None = None) -> None:
        """Raise ReplacedModuleError where sites at these paths (None: any) are missing."""
        concerned = [path for path in self.missing if paths is None or path in paths]
        if concerned:
            raise ReplacedModuleError(
                f"{'; '.join(self._changes(concerned))}. These modules of the "
                f"{type(self._root).__qualname__} carried LoRA, and the delta would be "
                "lost. Put the old modules back, or detach the model and give it to lorafx "
                "again as it is now"
            )

    def lines(self) -> tuple[str, ...]:
        return tuple(self._changes(self.missing))

    def _below(self, edges: Iterable[Edge]) -> list[Site]:
        held = {id(module) for edge in edges for module in edge.child.modules()}
        return [site for site in self._sites if id(site.module) in held]

    def _changes(self, paths: Collection[str]) -> list[str]:
        places = {id(module): path for path, module in self._root.named_modules()}
        found = []
        for edge in self._broken:
            lost = [site.path for site in self._below([edge]) if site.path in paths]
            # Below a module that is out of the model it does not matter what holds what.
            if not lost or (edge.parent is not self._root and id(edge.parent) not in places):
                continue
            fate = "taken out" if edge.now is None else f"replaced by {_described(edge.now)}"
            elsewhere = places.get(id(edge.child))
            found.append(
                f"{edge.path or '(root)'}, {_described(edge.child)}, was {fate} after lorafx was "
                "given the model"
                + (f" (now at {elsewhere})" if elsewhere is not None else "")
                + (f"; it holds {some(lost)}" if lost != [edge.path] else "")
            )
        return found[:3] + ([f"and {len(found) - 3} more places"] if len(found) > 3 else [])


def _described(module: nn.Module) -> str:
    """Class and sizes: `a Linear (8 -> 8)`."""
    entry, name = lookup(module), f"a {type(module).__qualname__}"
    try:
        sizes = None if entry is None else entry.sizes(module)
    except AttributeError:  # a subclass that does not keep them as the registered class does
        sizes = None
    return name if sizes is None else f"{name} ({sizes[0]} -> {sizes[1]})"


def hooks_of(module: nn.Module) -> Iterator[tuple[int, Mapping[int, Any]]]:
    """The number of each hook around the module's forward that is no mark, and its dictionary."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            if not isinstance(hook, MARKS):
                yield number, hooks


class HookWatch:
    """The hooks of others on the modules of one model. `around`: those of `root` itself run around
    its graphs. `state` is 0 with the first hooks; another number whenever there are others."""

    def __init__(self, root: nn.Module, sites: Sequence[Site]) -> None:
        self._root = root
        self.around = all(site.module is not root for site in sites)
        self._states = itertools.count(1)
        self._own = frozenset[int]()
        self._first = self._current = self._look()
        self.state = 0

    def look(self) -> int:
        if self._seen != RemovableHandle.next_id or any(
            number not in hooks for number, hooks in self._kept
        ):
            found = self._look() - self._own
            if found != self._current:
                self._current = found
                self.state = 0 if found == self._first else next(self._states)
        return self.state

    def take_over(self) -> None:
        """Accept hooks that a call has registered, as transformers does for hidden states."""
        if self._seen != RemovableHandle.next_id:
            self._own |= self._look() - self._current

    def _look(self) -> frozenset[int]:
        self._seen = RemovableHandle.next_id
        modules = (m for m in self._root.modules() if m is not self._root or not self.around)
        self._kept = [found for module in modules for found in hooks_of(module)]
        return frozenset(number for number, _ in self._kept)
