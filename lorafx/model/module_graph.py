"""The module graph: which instances a model holds, under which names, over which storages.

A networkx DiGraph with three kinds of node,

    module instance ──name──▶ module instance
    module instance ──name──▶ parameter or buffer ──▶ storage

One instance that several attributes reach is one node with several paths; one storage behind
several parameters (tied weights, packed weights) is one storage node. Only *registered*
submodules make paths, as in `nn.Module.named_modules`: a module that also sits in a plain
Python list or dict attribute is not reached through it.

The canonical path of an instance is the first one in registration order, depth first, which is
the name `named_modules()` gives it. Other paths are aliases. Blocks that share blocks multiply
their paths, so `paths` lists at most `MAX_PATHS` of them, while `at` resolves any path by
walking and therefore knows all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import networkx as nx
import torch
from torch import Tensor, nn

from lorafx.errors import LorafxError, nearest

# ALBERT-like models reach one layer by 12 to 48 paths; beyond this it is a combinatorial product.
MAX_PATHS = 64

Node = tuple[Literal["module", "tensor", "storage"], int]


class Owner(NamedTuple):
    """One attribute that holds a tensor: canonical module path, module, attribute name."""

    path: str
    module: nn.Module
    attribute: str


def storage_key(tensor: Tensor) -> int:
    """A number that two tensors share exactly when they share a storage, while both live.

    `data_ptr` will not do: it is 0 on the meta device. Tensor subclasses without a storage of
    their own (quantised or sharded wrappers) count as their own storage.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, AttributeError, ValueError):
        return -id(tensor)


@contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Inside the block `tensor` may be viewed and written in place, without gradients: tensors made
    in inference mode in that mode alone, all others outside of it."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def join(path: str, name: str) -> str:
    """The dotted path of child `name` of the module at `path`."""
    return f"{path}.{name}" if path else name


class ModuleGraph:
    """Instances, parameters, buffers and storages of one model, as it was when `of` was called.

    Modules and tensors are those of that moment. Storages are read anew by `sharing` and `tied`,
    because packing re-points parameters to another storage.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: nx.DiGraph,
        modules: dict[str, nn.Module],
        shared: Iterable[nn.Module],
    ) -> None:
        """`modules` by canonical path; `shared` are those that more than one name leads to."""
        self.root = root
        self.graph = graph
        self._modules = modules
        self._canonical = {id(module): path for path, module in modules.items()}
        self._several = self._below(shared)

    @classmethod
    def of(cls, root: nn.Module) -> ModuleGraph:
        """The graph of `root` and everything registered below it, in one walk over its edges."""
        graph: nx.DiGraph = nx.DiGraph()
        modules: dict[str, nn.Module] = {}
        known: set[int] = set()
        shared: list[nn.Module] = []
        # (parent node, attribute, path, module); popped in the order of named_modules().
        stack: list[tuple[Node | None, str, str, nn.Module]] = [(None, "", "", root)]
        while stack:
            parent, name, path, module = stack.pop()
            node: Node = ("module", id(module))
            if parent is not None:
                _add_edge(graph, parent, node, name)
            if id(module) in known:
                shared.append(module)
                continue
            known.add(id(module))
            modules[path] = module
            graph.add_node(node, kind="module", module=module, path=path)
            for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
                for attribute, tensor in tensors.items():
                    if tensor is None:
                        continue
                    leaf: Node = ("tensor", id(tensor))
                    graph.add_node(leaf, kind=kind, tensor=tensor)
                    _add_edge(graph, node, leaf, attribute)
            stack.extend(
                (node, child_name, join(path, child_name), child)
                for child_name, child in reversed(list(module._modules.items()))
                if child is not None
            )
        self = cls(root, graph, modules, shared)
        self._read_storages()
        return self

    @property
    def holds(self) -> bool:
        """Whether the model still has the modules, parameters and buffers that it had then."""
        graph = self.graph
        for module in self._modules.values():
            node, count = ("module", id(module)), 0
            for kind, held in (
                ("module", module._modules),
                ("tensor", module._parameters),
                ("tensor", module._buffers),
            ):
                for name, value in held.items():
                    if value is None:
                        continue
                    edge = graph.get_edge_data(node, (kind, id(value)))
                    if edge is None or name not in edge["names"]:
                        return False
                    count += 1
            known = (graph.get_edge_data(node, other)["names"] for other in graph.successors(node))
            if count != sum(map(len, known)):
                return False
        return True

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(canonical path, module) of every instance, in the order of `named_modules()`."""
        yield from self._modules.items()

    def has(self, module: nn.Module) -> bool:
        """Whether the model holds this instance."""
        return id(module) in self._canonical

    def path(self, module: nn.Module) -> str:
        """Canonical path of an instance. LorafxError when the model does not hold it."""
        try:
            return self._canonical[id(module)]
        except KeyError:
            raise LorafxError(
                f"a {type(module).__qualname__} that is not part of this "
                f"{type(self.root).__qualname__}; call ModuleGraph.of again after changing "
                "modules"
            ) from None

    def paths(self, module: nn.Module, limit: int = MAX_PATHS) -> tuple[str, ...]:
        """Canonical path first, then aliases, at most `limit` in all.

        Paths that pass one instance twice (cycles) are left out. LorafxError when the model does
        not hold `module`.
        """
        found = dict.fromkeys([self.path(module)])
        if id(module) not in self._several:
            return tuple(found)
        root: Node = ("module", id(self.root))
        start: Node = ("module", id(module))
        # Every parent chain of a graph without cycles ends at the root; the step bound is for
        # cyclic ones, whose chains can run into themselves.
        steps = 64 * limit
        chains: list[tuple[Node, str, frozenset[Node]]] = [(start, "", frozenset([start]))]
        while chains and len(found) < limit and steps:
            steps -= 1
            node, suffix, seen = chains.pop()
            if node == root:
                found[suffix] = None
                continue
            for parent in reversed(list(self.graph.predecessors(node))):
                if parent in seen:
                    continue
                for name in reversed(self._names(parent, node)):
                    longer = f"{name}.{suffix}" if suffix else name
                    chains.append((parent, longer, seen | {parent}))
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

    def parent(self, path: str) -> nn.Module:
        """The instance that holds the last name of `path`. LorafxError for the root."""
        if not path:
            raise LorafxError("the root module has no parent")
        self.at(path)
        return self.at(path.rpartition(".")[0])

    def ancestors(self, modules: Iterable[nn.Module]) -> set[int]:
        """`id` of each module instance that reaches one of `modules`, themselves included."""
        seen: set[Node] = set()
        pending: list[Node] = [("module", id(module)) for module in modules]
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending.extend(self.graph.predecessors(node))
        return {key for _, key in seen}

    def owners(self, tensor: Tensor) -> list[Owner]:
        """The attributes that hold this very parameter or buffer; empty when none does."""
        leaf: Node = ("tensor", id(tensor))
        if leaf not in self.graph:
            return []
        return [
            Owner(data["path"], data["module"], name)
            for node in self.graph.predecessors(leaf)
            for data in (self.graph.nodes[node],)
            for name in self._names(node, leaf)
        ]

    def sharing(self, tensor: Tensor) -> list[Owner]:
        """The attributes whose parameter or buffer lies in the storage of `tensor`, now."""
        self._read_storages()
        storage: Node = ("storage", storage_key(tensor))
        if storage not in self.graph:
            return []
        return [
            owner
            for leaf in self.graph.predecessors(storage)
            for owner in self.owners(self.graph.nodes[leaf]["tensor"])
        ]

    def alone(self) -> frozenset[int]:
        """`id` of each parameter and buffer that one attribute holds and that shares its storage
        with no other, nor with a plain tensor attribute of a module, now."""
        self._read_storages()
        graph = self.graph
        viewed = {
            storage_key(value)
            for _, module in self.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor)
        }
        return frozenset(
            key
            for (kind, key), data in graph.nodes(data=True)
            if kind == "tensor"
            and len(self.owners(data["tensor"])) == 1
            and storage_key(data["tensor"]) not in viewed
            and all(graph.in_degree(storage) == 1 for storage in graph.successors((kind, key)))
        )

    def tied(self) -> list[tuple[Owner, ...]]:
        """Owners of each storage that more than one attribute holds, now."""
        self._read_storages()
        storages = [n for n, kind in self.graph.nodes(data="kind") if kind == "storage"]
        held = (
            tuple(
                owner
                for leaf in self.graph.predecessors(storage)
                for owner in self.owners(self.graph.nodes[leaf]["tensor"])
            )
            for storage in storages
        )
        return [owners for owners in held if len(owners) > 1]

    def _below(self, modules: Iterable[nn.Module]) -> set[int]:
        """`id` of `modules` and of everything below them."""
        seen: set[int] = set()
        pending = list(modules)
        while pending:
            module = pending.pop()
            if id(module) not in seen:
                seen.add(id(module))
                pending.extend(child for child in module._modules.values() if child is not None)
        return seen

    def _names(self, source: Node, target: Node) -> list[str]:
        # Not `graph.edges`: networkx keeps that view on the graph it points to, and the cycle
        # would keep the whole model alive until the garbage collector comes by.
        return self.graph.get_edge_data(source, target)["names"]

    def _read_storages(self) -> None:
        """Replace the storage nodes by the storages that the tensors have at this moment."""
        graph = self.graph
        graph.remove_nodes_from([n for n, k in graph.nodes(data="kind") if k == "storage"])
        leaves: list[tuple[Node, Any]] = [
            (n, data["tensor"]) for n, data in graph.nodes(data=True) if "tensor" in data
        ]
        for leaf, tensor in leaves:
            storage: Node = ("storage", storage_key(tensor))
            graph.add_node(storage, kind="storage")
            graph.add_edge(leaf, storage)


def _add_edge(graph: nx.DiGraph, source: Node, target: Node, name: str) -> None:
    """An edge with the attribute name; a second name for one pair joins the first."""
    if graph.has_edge(source, target):
        graph.get_edge_data(source, target)["names"].append(name)
    else:
        graph.add_edge(source, target, names=[name])
