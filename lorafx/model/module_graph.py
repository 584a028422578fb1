"""The module graph: which instances a model holds, under which names, over which storages.

    module ──name──▶ module
    module ──name──▶ parameter or buffer ──▶ storage

An instance that several attributes reach has several paths; a storage may lie behind several
parameters (tied weights, packed weights). The canonical path of an instance is the name that
`named_modules()` gives it: the first in registration order, depth first. Other paths are aliases,
of which `paths` lists at most `MAX_PATHS`, while `at` knows all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafx.errors import LorafxError, nearest

# ALBERT-like models reach one layer by 12 to 48 paths; beyond this it is a combinatorial product.
MAX_PATHS = 64


class Owner(NamedTuple):
    """An attribute that holds a tensor: canonical module path, module, attribute name."""

    path: str
    module: nn.Module
    attribute: str


def storage_key(tensor: Tensor) -> int:
    """A number that live tensors share exactly when they share a storage, on meta too."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, AttributeError, ValueError):
        return -id(tensor)


@contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Permits in-place writes of `tensor` without gradients, in inference mode if it needs that."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class ModuleGraph:
    """Instances, parameters and buffers of a model when this was made; storages are read anew."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules: dict[str, nn.Module] = {}
        self._canonical: dict[int, str] = {}
        #: The holders of modules and tensors by `id`: the module, and the name in it.
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {id(root): []}
        self._contents: dict[int, dict[str, nn.Module | Tensor]] = {}
        self._tensors: dict[int, Tensor] = {}
        shared: list[nn.Module] = []
        pending = [("", root)]  # popped in the order of named_modules()
        while pending:
            path, module = pending.pop()
            if id(module) in self._canonical:
                shared.append(module)
                continue
            self._modules[path], self._canonical[id(module)] = module, path
            contents = self._contents[id(module)] = _contents(module)
            for name, value in contents.items():
                self._holders.setdefault(id(value), []).append((module, name))
                if isinstance(value, Tensor):
                    self._tensors[id(value)] = value
            children = [(n, child) for n, child in contents.items() if isinstance(child, nn.Module)]
            pending += [(join(path, name), child) for name, child in reversed(children)]
        #: Modules and tensors that several paths lead to.
        self._shared = {id(below) for module in shared for below in module.modules()}

    @property
    def holds(self) -> bool:
        """Whether the model still has the modules, parameters and buffers that it had then."""
        for module in self._modules.values():
            then, now = self._contents[id(module)], _contents(module)
            if then.keys() != now.keys() or any(then[name] is not now[name] for name in now):
                return False
        return True

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self._modules.items()

    def has(self, module: nn.Module) -> bool:
        return id(module) in self._canonical

    def path(self, module: nn.Module) -> str:
        try:
            return self._canonical[id(module)]
        except KeyError:
            raise LorafxError(
                f"a {type(module).__qualname__} that is not part of this "
                f"{type(self.root).__qualname__}; make a new ModuleGraph after changing modules"
            ) from None

    def paths(self, module: nn.Module, limit: int = MAX_PATHS) -> tuple[str, ...]:
        """Canonical path first, then aliases, at most `limit`, without cycles."""
        found = dict.fromkeys([self.path(module)])
        if id(module) not in self._shared:
            return tuple(found)
        # Every parent chain of a graph without cycles ends at the root; the step bound is for
        # cyclic ones, whose chains can run into themselves.
        steps = 64 * limit
        chains: list[tuple[nn.Module, str, frozenset[int]]] = [
            (module, "", frozenset([id(module)]))
        ]
        while chains and len(found) < limit and steps:
            steps -= 1
            child, suffix, seen = chains.pop()
            if child is self.root:
                found[suffix] = None
                continue
            chains += [
                (parent, f"{name}.{suffix}" if suffix else name, seen | {id(parent)})
                for parent, name in reversed(self._holders[id(child)])
                if id(parent) not in seen
            ]
        return tuple(found)

    def find(self, path: str) -> nn.Module | None:
        """The instance that `path` reaches, canonical or alias, "" for the root; None if none."""
        module: nn.Module | None = self.root
        for name in path.split(".") if path else ():
            module = module._modules.get(name) if module is not None else None
        return module

    def at(self, path: str) -> nn.Module:
        """As `find`; LorafxError naming the nearest paths when there is none."""
        module = self.find(path)
        if module is None:
            raise LorafxError(
                f"{type(self.root).__qualname__} has no module {path!r}"
                f"{nearest(path, self._canonical.values())}"
            )
        return module

    def ancestors(self, modules: Iterable[nn.Module]) -> set[int]:
        """`id` of each module instance that reaches one of `modules`, themselves included."""
        seen: set[int] = set()
        pending = list(modules)
        while pending:
            module = pending.pop()
            if id(module) not in seen:
                seen.add(id(module))
                pending += [parent for parent, _ in self._holders.get(id(module), ())]
        return seen

    def owners(self, tensor: Tensor) -> list[Owner]:
        """The attributes that hold this very parameter or buffer."""
        return [
            Owner(self._canonical[id(module)], module, name)
            for module, name in self._holders.get(id(tensor), ())
        ]

    def alone(self) -> frozenset[int]:
        """`id` of parameters and buffers that one attribute holds and whose storage is unshared."""
        used = Counter(storage_key(tensor) for tensor in self._tensors.values())
        for module in self._modules.values():
            used.update(storage_key(t) for t in vars(module).values() if isinstance(t, Tensor))
        return frozenset(
            key
            for key, tensor in self._tensors.items()
            if len(self._holders[key]) == 1 and used[storage_key(tensor)] == 1
        )

    def tied(self) -> list[tuple[Owner, ...]]:
        """Owners of each storage that more than one attribute holds, now."""
        held: dict[int, list[Owner]] = {}
        for tensor in self._tensors.values():
            held.setdefault(storage_key(tensor), []).extend(self.owners(tensor))
        return [tuple(owners) for owners in held.values() if len(owners) > 1]


def _contents(module: nn.Module) -> dict[str, nn.Module | Tensor]:
    held = (*module._modules.items(), *module._parameters.items(), *module._buffers.items())
    return {name: value for name, value in held if value is not None}


#: Stands for an index in `shape_of` a path.
INDEX = "*"


def shape_of(path: str) -> str:
    """`path` with "*" in the place of each index into a list of modules."""
    return ".".join(INDEX if part.isdecimal() else part for part in path.split("."))


def joined(paths: Iterable[str]) -> str:
    """Paths of one `shape_of` as one: `layers.0.q`, `layers.1.q` → `layers.{0-1}.q`."""
    parts = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_indices(tuple(dict.fromkeys(names))) for names in parts) or "(root)"


def _indices(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    runs: list[list[int]] = []
    for index in sorted(map(int, names)):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return "{" + ",".join(texts) + "}"


def alike(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Lines `path: text`, one for all paths of one `shape_of` that have the same text."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, text in notes:
        found.setdefault((shape_of(path), text), []).append(path)
    return [f"{joined(paths)}: {text}" for (_, text), paths in found.items()]
