"""What changed in a model after it was marked: replaced modules and weights, hooks that are not
lorafx's, and methods of classes.

    model ──name──▶ layer ──name──▶ site      each edge has to lead to the same module as before

A mark is a hook of a module, but an adapter's factors belong to a path: if another module takes
that path, the delta is lost. Each call compares the edges, without a walk over the tree.

Dynamo does not guard on the hooks of a module that has none, so graphs do not notice later ones.
torch numbers all hooks of a process, so a call only compares one number. Nor does it guard on what
a class defines, such as the forward of each layer, nor, where experts broke a graph, on which
implementation transformers' switch chose for them.

A weight that wraps other tensors is the same object as long as what it wraps has the same form.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from lorafx.errors import ReplacedModuleError, some
from lorafx.model.experts import implementation, is_switched
from lorafx.model.marks import MARKS
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.sites import Site
from lorafx.registry import lookup

_CHILDREN = operator.attrgetter("_modules")
_PARAMETERS = operator.attrgetter("_parameters")


class Edge(NamedTuple):
    """`parent`'s attribute `name`, which held `child` when the model was marked."""

    path: str
    parent: nn.Module
    name: str
    child: nn.Module

    @property
    def current(self) -> nn.Module | None:
        return self.parent._modules.get(self.name)


class SiteWatch:
    """The edges that lead to the sites of one model. `missing` are the paths of sites that were
    replaced at the last look. `state` is 0 without any, else a number for what replaced them."""

    def __init__(self, graph: ModuleGraph, sites: Sequence[Site]) -> None:
        self._root = graph.root
        ancestors = graph.ancestors(m for site in sites for m in (site.module, site.marked))
        self._edges = [
            Edge(join(path, name), module, name, child)
            for path, module in graph.modules()
            if id(module) in ancestors
            for name, child in module._modules.items()
            if child is not None and id(child) in ancestors
        ]
        self._sites = tuple(sites)
        self._broken: list[Edge] = []
        #: The `id` of each broken edge, with the module that is there instead.
        self._replacements: list[tuple[int, nn.Module | None]] = []
        self._states = itertools.count(1)
        self.missing: frozenset[str] = frozenset()
        self.state = 0
        self._parents = [edge.parent for edge in self._edges]
        self._names = [edge.name for edge in self._edges]
        self._children = [edge.child for edge in self._edges]

    def look(self) -> bool:
        """Compare every edge. Returns whether anything changed since the last look."""
        broken = [edge for edge in self._edges if edge.current is not edge.child]
        old, new = self._replacements, [(id(edge), edge.current) for edge in broken]
        if len(old) == len(new) and all(
            a is b and key == old_key for (old_key, a), (key, b) in zip(old, new, strict=True)
        ):
            return False
        self._broken, self._replacements = broken, new
        self.missing = frozenset(site.path for site in self._below(broken))
        self.state = next(self._states) if broken else 0
        return True

    @property
    def needs_look(self) -> bool:
        """Whether modules were replaced at or since the last look. Compared in C: calls read it."""
        current = map(dict.get, map(_CHILDREN, self._parents), self._names)
        return bool(self.missing) or not all(map(operator.is_, current, self._children))

    def refuse(self, paths: Collection[str] | None = None) -> None:
        """Raise ReplacedModuleError if sites at these paths (None: any) are missing."""
        missing = [path for path in self.missing if paths is None or path in paths]
        if missing:
            raise ReplacedModuleError(
                f"{'; '.join(self._changes(missing))}. These modules of the "
                f"{type(self._root).__qualname__} carried LoRA, and the delta would be "
                "lost. Put the old modules back, or detach the model and give it to lorafx "
                "again as it is now"
            )

    def lines(self) -> tuple[str, ...]:
        return tuple(self._changes(self.missing))

    def _below(self, edges: Iterable[Edge]) -> list[Site]:
        below = {id(module) for edge in edges for module in edge.child.modules()}
        return [site for site in self._sites if id(site.module) in below]

    def _changes(self, paths: Collection[str]) -> list[str]:
        current_paths = {id(module): path for path, module in self._root.named_modules()}
        changes = []
        for edge in self._broken:
            sites = [site.path for site in self._below([edge]) if site.path in paths]
            # What a module that left the model holds does not matter.
            if not sites or (
                edge.parent is not self._root and id(edge.parent) not in current_paths
            ):
                continue
            change = (
                "taken out" if edge.current is None else f"replaced by {_described(edge.current)}"
            )
            new_path = current_paths.get(id(edge.child))
            changes.append(
                f"{edge.path or '(root)'}, {_described(edge.child)}, was {change} after lorafx was "
                "given the model"
                + (f" (now at {new_path})" if new_path is not None else "")
                + (f"; it holds {some(sites)}" if sites != [edge.path] else "")
            )
        return changes[:3] + ([f"and {len(changes) - 3} more places"] if len(changes) > 3 else [])


def _described(module: nn.Module) -> str:
    """Class and sizes: `a Linear (8 -> 8)`."""
    entry, name = lookup(module), f"a {type(module).__qualname__}"
    try:
        sizes = None if entry is None else entry.sizes(module)
    except AttributeError:  # a subclass that does not keep them as the registered class does
        sizes = None
    return name if sizes is None else f"{name} ({sizes[0]} -> {sizes[1]})"


def hooks_of(module: nn.Module) -> Iterator[tuple[int, Mapping[int, Any]]]:
    """Yields each hook around the module's forward that is no mark: its number, its dictionary."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            if not isinstance(hook, MARKS):
                yield number, hooks


class HookWatch:
    """The hooks on the modules of one model that are no marks. `around`: hooks of `root` itself run
    around its graphs. `state` is 0 for the hooks at first, and a new number after each change."""

    def __init__(self, root: nn.Module, sites: Sequence[Site]) -> None:
        self._root = root
        self.around = all(site.module is not root for site in sites)
        self._states = itertools.count(1)
        self._accepted, self._told = frozenset[int](), frozenset[int]()
        self._initial = self._current = self._hook_numbers()
        self.state = 0

    def look(self) -> int:
        if self._next_id != RemovableHandle.next_id or any(
            number not in hooks for number, hooks in self._hooks
        ):
            numbers = self._hook_numbers() - self._accepted
            if numbers != self._current:
                self._current = numbers
                self.state = 0 if numbers == self._initial else next(self._states)
        return self.state

    def new(self) -> list[Any]:
        """The hooks that users have registered since the last call of this method."""
        self.look()
        told = self._told | self._accepted
        self._told = frozenset(number for number, _ in self._hooks)
        return [hooks[number] for number, hooks in self._hooks if number not in told]

    def accept_new(self) -> None:
        """Ignore hooks that the call has registered, as transformers does for hidden states."""
        if self._next_id != RemovableHandle.next_id:
            self._accepted |= self._hook_numbers() - self._current

    def _hook_numbers(self) -> frozenset[int]:
        self._next_id = RemovableHandle.next_id
        modules = (m for m in self._root.modules() if m is not self._root or not self.around)
        self._hooks = [item for module in modules for item in hooks_of(module)]
        return frozenset(number for number, _ in self._hooks)


class ObjectWatch:
    """The objects that `read` yields. `state` is 0 for those at first, and a new number after each
    change; 0 again for those at first where they are `kept`, so that their memory is not freed.
    `same` compares two."""

    def __init__(
        self,
        read: Callable[[], Iterable[Any]],
        same: Callable[[Any, Any], bool] = operator.is_,
        *,
        kept: bool = False,
    ) -> None:
        self._read, self._same, self._states = read, same, itertools.count(1)
        self._current = [*read()]
        self._first = self._current if kept else []
        self.state = 0

    def look(self) -> int:
        if not self._present(self._current):
            self._current = [*self._read()]
            again = bool(self._first) and self._present(self._first)
            self.state = 0 if again else next(self._states)
        return self.state

    def holds(self, item: Any) -> bool:
        return any(item is known for known in self._current)

    def _present(self, objects: Sequence[Any]) -> bool:
        return all(map(self._same, self._read(), objects))


class SwitchWatch:
    """The implementations of experts that transformers' switch chooses. `look` gives 0 for those at
    first, and a number for each other choice: on GPUs `generate` switches to and fro."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        configs = (module.config for module in modules if is_switched(module))
        self._configs = list({id(config): config for config in configs}.values())
        self._states: dict[tuple[Any, ...], int] = {}
        self.look()

    def look(self) -> int:
        chosen = tuple(implementation(config) for config in self._configs)
        return self._states.setdefault(chosen, len(self._states))


def method_watch(modules: Iterable[nn.Module]) -> ObjectWatch:
    """What the classes of some modules define: their forward, and what stands beside it or in
    subclasses. Methods of classes are equal, and not the same object, each time they are read."""
    known = dict.fromkeys(map(type, modules))
    pairs = dict.fromkeys((c, name) for c in known for name in _methods(c))
    classes, names = [c for c, _ in pairs], [name for _, name in pairs]

    def read() -> Iterator[Any]:
        return map(getattr, classes, names, itertools.repeat(None))

    return ObjectWatch(read, operator.eq, kept=True)


def weight_watch(parameters: Iterable[tuple[nn.Module, str]]) -> ObjectWatch:
    """The parameters of these names in modules."""
    pairs = [(module, name) for module, name in parameters if name in module._parameters]
    modules, names = [module for module, _ in pairs], [name for _, name in pairs]
    return ObjectWatch(lambda: map(dict.get, map(_PARAMETERS, modules), names))


def _methods(module_class: type[nn.Module]) -> Iterator[str]:
    """The names of the methods of a class that its forward may call: those that it has beside its
    forward or in subclasses, but for what `nn.Module` has too, such as constructors."""
    # Read statically, for classes of torch.jit compute it. A container: no graph calls it.
    if inspect.getattr_static(module_class, "forward") is nn.Module.forward:
        return
    yield "forward"
    for base in module_class.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, _METHODS) and not hasattr(nn.Module, name):
                yield name
        if "forward" in vars(base):
            break


_METHODS = (FunctionType, staticmethod, classmethod, property)
