"""Tensors that the model computed and kept before the running call, and that depend on no request.

A module may keep a tensor in a dict that it computes once, a table of biases for example. In the
next call its origin is unknown. It depends on no request and no adapter if it existed before the
model was compiled, or if a graph computed it only from sizes and the model's tensors, without any
weight that carries LoRA, and as long as nothing writes into it. A buffer that has been written into
does not count: a forward may have left a result there that depends on a request or an adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lorafx.ownership.memory import MemoryState, state_of, storage_of
from lorafx.program.frame import Frame
from lorafx.torch_internals.aot_autograd import PlainAOTOutput


class Remembered:
    """Storages of such tensors, with the state that each had."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, MemoryState]] = {}

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """These are such tensors, as they are now."""
        self._known = {k: item for k, item in self._known.items() if not item[0].expired()}
        for tensor in tensors:
            key = storage_of(tensor)
            if key is not None and not tensor.is_inference():
                reference = StorageWeakRef(tensor.untyped_storage())
                self._known[key] = reference, state_of(tensor, digested=True)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this lies in the memory of one of them, and nobody has written into it."""
        found = self._known.get(key) if (key := storage_of(tensor)) is not None else None
        if found is None or found[0].expired() or tensor.is_inference():
            return False
        return found[1] == state_of(tensor, digested=True)


def in_containers(model: nn.Module) -> Iterator[Tensor]:
    """The tensors in dicts, lists and tuples that the modules have as attributes."""
    for module in model.modules():
        for value in vars(module).values():
            if value is module._parameters or value is module._buffers:
                continue
            items = value.values() if isinstance(value, Mapping) else value
            if isinstance(value, (Mapping, Sequence)) and not isinstance(value, (str, bytes)):
                yield from (item for item in items if isinstance(item, Tensor))


class TensorVersions:
    """The states, but for their bytes, that tensors of a model had when it was compiled."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._known = {
            id(tensor): (weakref.ref(tensor), state_of(tensor, digested=False))
            for tensor in tensors
            if not tensor.is_inference()
        }

    def unwritten(self, tensor: object) -> bool:
        """Whether this is one of them, and nobody has written into it. Parameters count always:
        new weights are written into them, and no forward does."""
        if isinstance(tensor, nn.Parameter):
            return True
        reference, state = self._known.get(id(tensor), (None, None))
        if reference is None or not isinstance(tensor, Tensor) or reference() is not tensor:
            return False
        return state == state_of(tensor, digested=False)


def constants_of(graph: fx.Graph, frame: Frame) -> dict[int, tuple[int, ...]]:
    """Positions of the results of a functional graph that are computed from nothing but sizes and
    tensors of the model that are no site's, each with the positions of those tensors."""
    places = {id(item): position for position, item in enumerate(frame.inputs)}
    free: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            item = frame.by_node.get(node)
            if item is None:
                continue
            if item.kind == "state" and item.holder is not None and id(item) in places:
                free[node] = frozenset([places[id(item)]])
            elif item.kind == "symbol":
                free[node] = frozenset()
        elif node.op == "call_function" and all(i in free for i in node.all_input_nodes):
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded not in tags:
                free[node] = frozenset().union(*(free[i] for i in node.all_input_nodes))
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = zip(output.args[0], output.meta.get("desc") or (), strict=False)
    return {
        place.idx: tuple(free[node])
        for node, place in results
        if isinstance(place, PlainAOTOutput)
        and node in free
        and node.op != "placeholder"
        and isinstance(node.meta["val"], Tensor)
    }
