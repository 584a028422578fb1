"""Owners of the tensors that one captured graph of a call hands to the next.

Where a model breaks into several graphs, the inputs of a later one are results of an earlier one.
What `provenance` proved about a result holds for the very same tensor wherever it goes, as long as
nobody writes into it: entry i along `dim` belongs to request i, or (dim None) all requests share
it. Anything that Python computes between two graphs is unknown.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import (
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
)

from lorafx.ownership.labels import Own
from lorafx.ownership.symbolic import ONE
from lorafx.serving.roles import Role

_RESULT = "a result of an earlier graph"


class Ledger:
    """The tensors that the running call's graphs have returned so far, with their roles."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Role | None]] = {}

    def put(self, tensor: object, role: Role | None) -> None:
        """Note what `tensor` is; None takes a note back."""
        if not isinstance(tensor, Tensor):
            return
        if role is None or tensor.is_inference():  # whose writes are not counted
            self._known.pop(id(tensor), None)
        else:
            self._known[id(tensor)] = (weakref.ref(tensor), tensor._version, role)

    def put_result(self, tensor: object) -> None:
        """Note that a graph returned `tensor`, whose role is not known so far."""
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            self._known[id(tensor)] = (weakref.ref(tensor), tensor._version, None)

    def get(self, tensor: Tensor) -> Role | None:
        """The role noted for this very tensor, unless it was written since."""
        return self._known[id(tensor)][2] if self.returned(tensor) else None

    def returned(self, tensor: Tensor) -> bool:
        """Whether a graph returned this very tensor and nobody has written into it since."""
        reference, version, _ = self._known.get(id(tensor), (None, 0, None))
        return reference is not None and reference() is tensor and tensor._version == version


@dataclass
class Handover:
    """What one graph takes over from earlier graphs of its call, and what it hands on.

    Attributes:
        taken: inputs that earlier graphs returned, by position, with the roles that the proofs
            of this graph rest on.
        given: roles of its results, by position.
        written: roles of its inputs after it has written into them, by position.
        fresh: it has not run yet; a graph that is captured next may need its results.
    """

    taken: dict[int, Role] = field(default_factory=dict)
    given: dict[int, Role] = field(default_factory=dict)
    written: dict[int, Role | None] = field(default_factory=dict)
    fresh: bool = True

    def holds(self, ledger: Ledger, arguments: Sequence[object]) -> bool:
        """Whether the inputs of this call are what they were when the graph was captured."""
        return all(
            isinstance(tensor := arguments[position], Tensor) and ledger.get(tensor) == role
            for position, role in self.taken.items()
        )

    def note(
        self, ledger: Ledger, arguments: Sequence[object], results: object, *, known: bool
    ) -> None:
        """Put the roles of this call's results and written inputs into the ledger."""
        for position, role in self.written.items():
            ledger.put(arguments[position], role if known else None)
        if isinstance(results, (list, tuple)):
            for result in results:
                ledger.put_result(result)
            for position, role in self.given.items():
                ledger.put(results[position], role if known else None)


def results_of(graph: fx.Graph, labels: Mapping[fx.Node, object]) -> Handover:
    """The roles of a graph's results, from the labels that provenance gave them."""
    found = Handover()
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = output.args[0]
    if not isinstance(results, (list, tuple)):  # AOTAutograd always returns a tuple
        results = (results,)
    for node, place in zip(results, output.meta.get("desc") or (), strict=False):
        if not isinstance(node, fx.Node):
            continue
        role = _role(labels.get(node, ()))
        if isinstance(place, PlainAOTOutput) and role is not None:
            found.given[place.idx] = role
        elif isinstance(place, InputMutationAOTOutput):
            target = place.mutated_input
            if isinstance(target, PlainAOTInput):
                found.written[target.idx] = role
    return found


def _role(label: object) -> Role | None:
    if label is None:
        return Role(_RESULT, None)
    if isinstance(label, Own) and label.rows == ONE and label.perm is None:
        return Role(_RESULT, label.dim)
    return None
