"""Inputs that are the same tensors in every call, looked up once: banks and packed weights.

They are hidden from Dynamo, whose bytecode would load them module by module (6.5 µs per call and
layer). Each call compares the weights of the banks' sites, since modules may change places.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lorafx.model.sites import Group, Site
from lorafx.program.frame import Frame
from lorafx.program.program import Program


@dataclass(frozen=True)
class BoundInputs:
    """The last inputs of a graph: `banks` by group and tensor name, `packed` by index and tensor
    name; and the positions of their sites' `weights`."""

    banks: tuple[tuple[Group, str], ...]
    packed: tuple[tuple[int, str], ...]
    weights: tuple[tuple[int, Site], ...]

    @property
    def count(self) -> int:
        return len(self.banks) + len(self.packed)

    def tensors(self, program: Program) -> tuple[Tensor, ...]:
        packs = [getattr(program.packed[number], name) for number, name in self.packed]
        return (*(group.bank.tensors[name] for group, name in self.banks), *packs)

    def around(self, program: Program, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The executable; raises ReplacedModuleError for an active adapter's replaced weight."""
        binding = _Binding(self, program)
        program.bindings.append(binding)
        held = weakref.ref(binding)  # Dynamo keeps some executables for ever

        def run(*arguments: Any) -> Any:
            binding = held()
            assert binding is not None  # guards rest on the program's own marks
            binding.check(arguments)
            return compiled(*arguments, *binding.tensors)

        return run


class _Binding:
    def __init__(self, bound: BoundInputs, program: Program) -> None:
        self.tensors = bound.tensors(program)
        self._program = program
        first, *others = (position for position, _ in bound.weights)
        # itemgetter of a single position would give no tuple.
        self._weights_of = operator.itemgetter(first, first, *others)
        self._sites = [site for _, site in bound.weights]
        self._known = self._now()

    def _now(self) -> list[Tensor | None]:
        weights = [self._program.weight_of(site) for site in self._sites]
        return [weights[0], *weights]

    def check(self, arguments: Sequence[Any]) -> None:
        if not all(map(operator.is_, self._weights_of(arguments), self._known)):
            self._program.look_at_modules()
            self._program.refuse_missing(self._program.batch.touched)
            # A parameter was replaced, or the replaced one has no adapter in this batch.
            self._known = self._now()


def bind(
    program: Program, frame: Frame, gm: fx.GraphModule, examples: Sequence[Any]
) -> tuple[BoundInputs | None, list[Any]]:
    """The bindable inputs, now last in graph and frame, and the reordered examples."""
    places = {
        id(site): position
        for position, item in enumerate(frame.inputs)
        for site in item.sites
        if item.kind == "weight" and item.derived is None
    }
    numbers = {id(pack.group): number for number, pack in enumerate(program.packed)}
    banks: dict[int, tuple[Group, str]] = {}
    packed: dict[int, tuple[int, str]] = {}
    for position, item in enumerate(frame.inputs):
        group = item.group
        if group is None or any(id(site) not in places for site in group.sites):
            continue  # a later change of its sites would go unnoticed
        if item.kind == "bank":
            banks[position] = group, item.label
        elif item.kind == "packed":
            packed[position] = numbers[id(group)], item.label
    last = [*banks, *packed]
    if not last:
        return None, list(examples)
    bound = {*last}
    order = [position for position in range(len(examples)) if position not in bound] + last
    now = {before: position for position, before in enumerate(order)}
    groups = {id(group): group for group, _ in banks.values()}
    groups |= {id(program.packed[n].group): program.packed[n].group for n, _ in packed.values()}
    weights = [(now[places[id(site)]], site) for group in groups.values() for site in group.sites]
    _reorder(gm.graph, order)
    gm.recompile()
    frame.reorder(order)
    found = BoundInputs(tuple(banks.values()), tuple(packed.values()), tuple(weights))
    return found, [examples[position] for position in order]


def _reorder(graph: fx.Graph, order: Sequence[int]) -> None:
    nodes = graph.find_nodes(op="placeholder")
    for before, position in itertools.pairwise(order):
        nodes[before].append(nodes[position])


def take_out(gm: fx.GraphModule, graph: fx.Graph, bound: Sequence[Tensor]) -> None:
    """Turn the last inputs of Dynamo's graph into attributes, which bytecode does not load."""
    nodes = graph.find_nodes(op="placeholder")[-len(bound) :]
    for number, (node, tensor) in enumerate(zip(nodes, bound, strict=True)):
        name = f"_lorafx_bound_{number}"
        setattr(gm, name, tensor)
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", name)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
