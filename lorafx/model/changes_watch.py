"""What changed on a model after it was marked: replaced modules, and hooks of others.

    model ──name──▶ layer ──name──▶ site      each of these edges leads to the very same module

A mark hangs on a module, and an adapter's factors belong to a path: were another module to take
that path, the delta would be lost. No call walks the tree: torch reports every module that is
registered. For deletions, insertions and writes to `_modules`, which torch does not report, Dynamo
captures anew, and every capture checks the edges.

Dynamo guards on nothing of a module without forward hooks, so graphs do not notice later hooks.
torch numbers the hooks of a process, so a call compares one number.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from lorafx.errors import ReplacedModuleError, some
from lorafx.model.marks import MARKS
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.sites import Site
from lorafx.registry import lookup
from lorafx.torch_internals.compat import tracing


class _Registrations:
    def __init__(self) -> None:
        self.number = 0
        #: How many watches look at the children of a module, by its identity.
        self.parents: Counter[int] = Counter()
        self._hooked = False

    def follow(self, parents: Sequence[int]) -> None:
        if not self._hooked:
            register_module_module_registration_hook(_registered)
            self._hooked = True
        self.parents.update(parents)

    def forget(self, parents: Sequence[int]) -> None:
        for key in parents:
            self.parents[key] -= 1
            if self.parents[key] <= 0:
                del self.parents[key]


_REGISTRATIONS = _Registrations()


def _registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
    # Dynamo traces this where a forward makes modules, and must not guard on this state.
    if not tracing() and id(module) in _REGISTRATIONS.parents:
        _REGISTRATIONS.number += 1


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
        self._seen = _REGISTRATIONS.number
        parents = list({id(edge.parent) for edge in self._edges})
        _REGISTRATIONS.follow(parents)
        weakref.finalize(self, _REGISTRATIONS.forget, parents)

    def look(self) -> bool:
        """Look at every edge; whether anything changed since the last look."""
        self._seen = _REGISTRATIONS.number
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
        """Whether only a look can tell what is missing: a module that was missing may be back."""
        return self._seen != _REGISTRATIONS.number or bool(self.missing)

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
