"""The module graph: which instances a model holds, under which names, over which storages.

    module ──name──▶ module
    module ──name──▶ parameter or buffer ──▶ storage

An instance that several attributes reach has several paths; a storage may lie behind several
parameters (tied weights, packed weights). The canonical path of an instance is the name that
`named_modules()` gives it: the first in registration order, depth first. Other paths are aliases,
of which `paths` lists at most `MAX_PATHS`, while `find` and `at` accept all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lorafx.errors import LorafxError, nearest
from lorafx.model.made_weights import has_weight
from lorafx.placements import local
from lorafx.registry import lookup

T = TypeVar("T")

# ALBERT-like models reach one layer by 12 to 48 paths; beyond this it is a combinatorial product.
MAX_PATHS = 64


@dataclass(frozen=True)
class Holder:
    """An attribute of a module that holds a tensor."""

    path: str
    module: nn.Module
    attribute: str

    def __str__(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def tensor(self) -> Any:
        """What it holds now; None if the attribute is gone."""
        return getattr(self.module, self.attribute, None)

    @property
    def local(self) -> Tensor:
        """The tensor, or this rank's part of a DTensor."""
        return local(self.tensor)

    @property
    def is_own_weight(self) -> bool:
        """Whether it is the weight or bias of a module that may be a site, such as a tied head; or
        anything of one that has no such attribute, where it is a part of the weight."""
        entry = lookup(self.module)
        if entry is None or self.attribute in (entry.weight, "bias"):
            return entry is not None
        return not has_weight(self.module, entry.weight)


def storage_key(tensor: Tensor) -> int:
    """A number that two live tensors share exactly if they share a storage, also on meta."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, AttributeError, ValueError):
        return -id(tensor)


class ByStorage(Generic[T]):
    """Finds items by the storages of their tensors."""

    def __init__(self, items: Iterable[tuple[T, Tensor]]) -> None:
        self._items: dict[int, list[tuple[T, Tensor]]] = {}
        for item, tensor in items:
            self._items.setdefault(storage_key(tensor), []).append((item, tensor))

    def beside(self, tensor: Tensor) -> Sequence[tuple[T, Tensor]]:
        """The items with the storage of this tensor, and their tensors."""
        return self._items.get(storage_key(tensor), ())

    def overlapping(self, tensor: Tensor) -> list[tuple[T, Tensor]]:
        """Those whose bytes lie between the first and the last of this tensor's: siblings that are
        packed have one storage."""
        start, stop = _byte_range(tensor)
        ranges = ((pair, _byte_range(pair[1])) for pair in self.beside(tensor))
        return [
            pair
            for pair, (first, last) in ranges
            if pair[1] is tensor or (start < last and first < stop)
        ]


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    itemsize, elements = tensor.element_size(), 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements += (size - 1) * stride
    start = int(tensor.storage_offset()) * itemsize
    return start, start + elements * itemsize * bool(tensor.numel())


@contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Permits in-place writes to `tensor` without gradients, in inference mode if made there."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class ModuleGraph:
    """A model's instances, parameters and buffers at construction; storages are never cached."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules: dict[str, nn.Module] = {}
        self._canonical: dict[int, str] = {}
        #: By `id` of a module or tensor: the modules that hold it, each with its name there.
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
    def is_current(self) -> bool:
        """Whether the model still has the same modules, parameters and buffers."""
        for module in self._modules.values():
            old, new = self._contents[id(module)], _contents(module)
            if old.keys() != new.keys() or any(old[name] is not new[name] for name in new):
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
        """The canonical path first, then aliases, at most `limit` in all, without cycles."""
        paths = dict.fromkeys([self.path(module)])
        if id(module) not in self._shared:
            return tuple(paths)
        # Without cycles every chain of parents ends at the root; the step bound is for cyclic
        # graphs, whose chains may not end.
        steps = 64 * limit
        chains: list[tuple[nn.Module, str, frozenset[int]]] = [
            (module, "", frozenset([id(module)]))
        ]
        while chains and len(paths) < limit and steps:
            steps -= 1
            child, suffix, seen = chains.pop()
            if child is self.root:
                paths[suffix] = None
                continue
            chains += [
                (parent, f"{name}.{suffix}" if suffix else name, seen | {id(parent)})
                for parent, name in reversed(self._holders[id(child)])
                if id(parent) not in seen
            ]
        return tuple(paths)

    def find(self, path: str) -> nn.Module | None:
        """The instance at `path`, canonical or an alias, "" for the root; None if there is none."""
        module: nn.Module | None = self.root
        for name in path.split(".") if path else ():
            children = {} if module is None else module._modules
            module = children[name] if name in children else None  # noqa: SIM401  torch.jit's
        return module

    def at(self, path: str) -> nn.Module:
        """As `find`, but raises LorafxError, which names the nearest paths, if there is none."""
        module = self.find(path)
        if module is None:
            raise LorafxError(
                f"{type(self.root).__qualname__} has no module {path!r}"
                f"{nearest(path, self._canonical.values())}"
            )
        return module

    def ancestors(self, modules: Iterable[nn.Module]) -> set[int]:
        """The `id` of each module that contains one of `modules`, and of these themselves."""
        seen: set[int] = set()
        pending = list(modules)
        while pending:
            module = pending.pop()
            if id(module) not in seen:
                seen.add(id(module))
                pending += [parent for parent, _ in self._holders.get(id(module), ())]
        return seen

    def holders(self, tensor: Tensor) -> list[Holder]:
        """The attributes that hold this very parameter or buffer."""
        return [
            Holder(self._canonical[id(module)], module, name)
            for module, name in self._holders.get(id(tensor), ())
        ]

    def unshared(self) -> frozenset[int]:
        """The `id` of each tensor with a single holder and a storage that no other tensor uses."""
        used = Counter(storage_key(tensor) for tensor in self._tensors.values())
        for module in self._modules.values():
            used.update(storage_key(t) for t in vars(module).values() if isinstance(t, Tensor))
        return frozenset(
            key
            for key, tensor in self._tensors.items()
            if len(self._holders[key]) == 1 and used[storage_key(tensor)] == 1
        )

    def tied(self) -> list[tuple[Holder, ...]]:
        """The holders of each storage that several attributes hold now."""
        by_storage: dict[int, list[Holder]] = {}
        for tensor in self._tensors.values():
            by_storage.setdefault(storage_key(tensor), []).extend(self.holders(tensor))
        return [tuple(holders) for holders in by_storage.values() if len(holders) > 1]


def _contents(module: nn.Module) -> dict[str, nn.Module | Tensor]:
    items = (*module._modules.items(), *module._parameters.items(), *module._buffers.items())
    return {name: value for name, value in items if value is not None}


#: Stands for an index in the `shape_of` a path.
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


def joined_lines(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Lines `path: text` of (path, text) pairs, joining paths with the same text and `shape_of`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, text in notes:
        groups.setdefault((shape_of(path), text), []).append(path)
    return [f"{joined(paths)}: {text}" for (_, text), paths in groups.items()]
