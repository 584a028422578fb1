"""What the layers of a kind take, return and write into, as a stamp has to say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.kernels.ops.stamp_op import without_data
from lorafx.model.module_graph import storage_key
from lorafx.passes.outline.isomorphism import Stretch
from lorafx.program.frame import fake_value
from lorafx.torch_internals.dispatch_modes import TorchDispatchMode
from lorafx.torch_internals.fake_tensors import FakeTensor, FakeTensorMode, enable_python_dispatcher
from lorafx.torch_internals.trees import tree_leaves


@dataclass(frozen=True)
class Layer:
    """One layer of a kind: its nodes, the tensors that it takes, and what is read behind it."""

    nodes: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]


def layers_of(stretches: Sequence[Stretch], replaced: Mapping[fx.Node, fx.Node]) -> list[Layer]:
    """The layers of a kind. What is read behind one of them is a result of each. `replaced` are
    results of layers that were stamped since the stretches were looked at."""
    read = set()
    for stretch in stretches:
        own = set(stretch.nodes)
        for place, node in enumerate(stretch.nodes):
            if any(user not in own for user in node.users):
                read.add(place)
    found = []
    for stretch in stretches:
        sizes = tuple(node for node in stretch.operands if is_size(fake_value(node)))
        taken = tuple(replaced.get(n, n) for n in stretch.operands if n not in sizes)
        returned = tuple(stretch.nodes[place] for place in sorted(read))
        found.append(Layer(stretch.nodes, taken, returned, sizes))
    return found


def is_size(value: Any) -> bool:
    """Equal for all layers of a kind: a symbol of theirs, or computed from some."""
    return isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """A tensor that AOTAutograd takes as one."""
    return isinstance(value, FakeTensor) and value.layout is torch.strided


class _Writes(TorchDispatchMode):
    """Notes the memory that operators write into, or may where their schema does not say."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written: Any = (args, kwargs)
        if (schema := getattr(func, "_schema", None)) is not None:
            given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
            names = (a.name for a in schema.arguments if a.is_write)
            written = [given.get(name) for name in names]
        leaves = tree_leaves(written)
        self.memory |= {storage_key(item) for item in leaves if isinstance(item, Tensor)}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Effects:
    """What layers do beside computing new tensors, by places among what they take and return.

    Attributes:
        written: operands that are written into.
        passed: results that are an operand itself, and which.
    """

    written: tuple[int, ...]
    passed: Mapping[int, int]

    def made_by(self, layer: Layer) -> list[fx.Node]:
        """The results of the layer that are new tensors."""
        return [node for at, node in enumerate(layer.returned) if at not in self.passed]


def effects_of(layers: Sequence[Layer], mode: FakeTensorMode) -> Effects | None:
    """What the layers do, tried on tensors without data; None where a stamp cannot say it.

    Operators that write are recognised as they run: a function of torch may write whatever its
    name is.
    """
    layer = layers[0]
    values = [fake_value(node) for node in (*layer.taken, *layer.returned)]
    if not all(map(is_plain, values)):
        return None
    made: dict[fx.Node, Any] = {node: fake_value(node) for node in layer.sizes}
    # With symbolic sizes, composite operators such as matmul are served by their decompositions.
    with enable_python_dispatcher(), mode, torch.inference_mode(False), torch.no_grad():
        made.update((node, without_data(fake_value(node))) for node in layer.taken)
        with _Writes() as writes:
            for node in layer.nodes:
                if node.op not in ("call_function", "call_method"):
                    return None  # a constant, or the graph of a branch
                args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = _called(node, args, kwargs)
    operands = {id(made[node]): place for place, node in enumerate(layer.taken)}
    results = [made[node] for node in layer.returned]
    passed = {at: operands[id(r)] for at, r in enumerate(results) if id(r) in operands}
    given = [storage_key(made[node]) for node in layer.taken]
    new = [storage_key(result) for at, result in enumerate(results) if at not in passed]
    if not new or len({*given, *new}) != len(given) + len(new):
        return None
    written = tuple(place for place, memory in enumerate(given) if memory in writes.memory)
    return Effects(written, passed) if all(_are_apart(each, written) for each in layers) else None


def _are_apart(layer: Layer, places: Sequence[int]) -> bool:
    """Whether the operands at these places are inputs of the graph, in memory that no other operand
    shares: what is written into them may be copied into them later."""
    memory = [storage_key(fake_value(node)) for node in layer.taken]
    return all(
        layer.taken[place].op == "placeholder" and memory.count(memory[place]) == 1
        for place in places
    )


def _called(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
