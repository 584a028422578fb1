"""Owners of tensors handed from a captured graph of a call to the next.

The call's memory holds `provenance`'s proofs about results, and the owners tracked between graphs
(`lorafx/capture/tracking.py`). A proof holds in a call where index i of its inputs belongs to the
same single request in each, or where all inputs belong to a single request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, fx

from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import One, Own
from lorafx.ownership.memory import (
    NOBODY,
    SHARED,
    Alone,
    Held,
    Listed,
    Memory,
    Shared,
    each_repeated,
    listed,
    same_owners,
    storage_of,
)
from lorafx.ownership.real import alone
from lorafx.ownership.symbolic import divide
from lorafx.program.argument_roles import Role
from lorafx.torch_internals.dynamo import (
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
)

_RESULT = "a result of an earlier graph"


@dataclass(frozen=True)
class OfList:
    """Index i of the inputs of a graph's proof belongs to row owners[i] of the batch."""

    owners: tuple[int, ...]
    in_order: bool = False


#: The owners of a graph's rows in a call, if known.
Rows: TypeAlias = OfList | Alone


def role_of(held: Held | None) -> Role | None:
    """The role of a tensor with this label for a new graph."""
    if isinstance(held, Shared):
        return Role(_RESULT, None)
    if isinstance(held, Listed):
        return Role(_RESULT, held.dim)
    return Role(_RESULT, 0) if isinstance(held, Alone) else None


def held_argument(role: Role, tensor: Tensor, requests: int) -> Held | None:
    """The label of an argument by its role."""
    if not role.known:
        return None
    if role.dim is None:
        return SHARED
    size = tensor.shape[role.dim] if role.dim < tensor.dim() else 0
    if size == requests:
        return listed(role.dim, tuple(range(requests)))
    return SHARED if size == 1 else None


@dataclass(frozen=True)
class Given:
    """A result's owners: index i along `dim`, of `periods` · n · R entries, belongs to row (i // R)
    mod n of the graph's n rows. Without `dim` it depends on `row`, or on no request."""

    dim: int | None = None
    periods: int = 1
    row: int | None = None

    def held(self, tensor: Tensor, rows: Rows | None) -> Held | None:
        if isinstance(rows, Alone):
            return rows
        if rows is not None and self.row is not None:
            return listed(0, rows.owners[self.row : self.row + 1])
        if rows is None or self.dim is None:
            return None if rows is None else SHARED
        size = tensor.shape[self.dim]
        owners = rows.owners
        step, rest = divmod(size, self.periods * len(owners))
        if rest or not step:
            return None
        if step == self.periods == 1:
            return listed(self.dim, owners)
        return listed(self.dim, tuple(owners[i // step % len(owners)] for i in range(size)))


def in_order_of(requests: int) -> OfList:
    """Index i belongs to row i of the batch."""
    return OfList(tuple(range(requests)), in_order=True)


@dataclass
class Handover:
    """The owners that a graph takes over from earlier graphs of its call, and hands on.

    Attributes:
        inputs: positions of inputs that may hold request data.
        taken: position -> role, which proofs rest on, of tensors from earlier graphs or Python.
        counted: positions of their sizes taken for the number of rows.
        writable: positions of the model's tensors that may have been written before.
        given: proofs of results, by position.
        written: proofs of inputs after the graph's writes, by position.
        seen: a graph without sites has unproved values; tracked calls run it operator by operator.
        fresh: it has not run yet; the next captured graph may need its results.
        constant: positions of results independent of requests and adapters -> positions of the
            model's tensors that they come from.
    """

    inputs: tuple[int, ...] = ()
    taken: dict[int, Role] = field(default_factory=dict)
    counted: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    given: dict[int, Given] = field(default_factory=dict)
    written: dict[int, Given | None] = field(default_factory=dict)
    seen: bool = False
    fresh: bool = True
    constant: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def rows(
        self,
        memory: Memory,
        arguments: Sequence[object],
        requests: int,
        of_call: Mapping[int, Role],
    ) -> Rows | None:
        """The owners of rows in a call of so many `requests` with arguments `of_call`."""
        rows = self._rows(memory, arguments, requests, of_call)
        if isinstance(rows, OfList) and any(
            arguments[position] != len(rows.owners) for position in self.counted
        ):
            return None
        for position in self.writable:
            held = memory.look(arguments[position])  # type: ignore[arg-type]
            if not isinstance(held, Shared) and held != rows:
                return None
        return rows

    def _rows(
        self,
        memory: Memory,
        arguments: Sequence[object],
        requests: int,
        of_call: Mapping[int, Role],
    ) -> Rows | None:
        if not self.inputs:
            return in_order_of(requests)
        helds: dict[int, Held | None] = {}
        for position in (*self.inputs, *self.taken):
            tensor = arguments[position]
            helds[position] = memory.look(tensor) if isinstance(tensor, Tensor) else None
        one = alone(list(helds.values()))
        if isinstance(one, Alone):
            return one
        lists: list[tuple[int, ...]] = []
        several: list[tuple[int, ...]] = []
        single: list[tuple[Role, Alone]] = []
        for position, role in self.taken.items():
            held, tensor = helds[position], arguments[position]
            if role.request is not None:
                if not isinstance(held, Alone):
                    return None
                single.append((role, held))
                continue
            if role.dim is None and isinstance(held, Shared):
                continue
            if isinstance(held, Listed) and held.dim == role.dim:
                (several if role.several else lists).append(held.owners)
            elif role.several:
                return None
            elif isinstance(held, Alone) and isinstance(tensor, Tensor) and role.dim is not None:
                lists.append((held.request,) * tensor.shape[role.dim])
            else:
                return None
        owners = same_owners(lists) if lists else tuple(range(requests))
        if owners is None or any(item != each_repeated(owners, item) for item in several):
            return None
        for role, whose in single:
            assert role.request is not None
            if role.requests != len(owners) or owners[role.request] != whose.request:
                return None
        if len(owners) == requests and all(o in (i, NOBODY) for i, o in enumerate(owners)):
            return in_order_of(requests)
        ordered = any(role.dim is not None for role in of_call.values())
        return None if ordered or NOBODY in owners else OfList(owners)

    def note(
        self,
        memory: Memory,
        arguments: Sequence[object],
        results: object,
        rows: Rows | None,
        *,
        looked_at: bool,
    ) -> None:
        """Keep labels of this call's results and written inputs, unless tracked (`looked_at`)."""
        for position, given in self.written.items():
            tensor = arguments[position]
            if isinstance(tensor, Tensor) and not looked_at:
                memory.write(tensor, _held(given, tensor, rows))
        if not isinstance(results, (list, tuple)):
            return
        inputs: dict[int | None, list[Tensor]] = {}
        for item in arguments:
            if isinstance(item, Tensor):
                inputs.setdefault(storage_of(item), []).append(item)
        for position, tensor in enumerate(results):
            if not isinstance(tensor, Tensor):
                continue
            held = _held(self.given.get(position), tensor, rows)
            if held is not None or not looked_at:
                memory.note(tensor, held, inputs.get(storage_of(tensor), ()))


def _held(given: Given | None, tensor: Tensor, rows: Rows | None) -> Held | None:
    if given is None:
        return rows if isinstance(rows, Alone) else None
    return given.held(tensor, rows)


def results_of(graph: fx.Graph, flow: Flow) -> Handover:
    """Proofs of a graph's results, from provenance's labels."""
    found = Handover()
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = output.args[0]
    if not isinstance(results, (list, tuple)):  # AOTAutograd always returns a tuple
        results = (results,)
    for node, place in zip(results, output.meta.get("desc") or (), strict=False):
        if not isinstance(node, fx.Node):
            continue
        given = _given(node, flow)
        found.seen |= given is None
        if isinstance(place, PlainAOTOutput) and given is not None:
            found.given[place.idx] = given
        elif isinstance(place, InputMutationAOTOutput):
            target = place.mutated_input
            if isinstance(target, PlainAOTInput):
                found.written[target.idx] = given
    return found


def _given(node: fx.Node, flow: Flow) -> Given | None:
    label = flow.labels.get(node, ())
    if label is None:
        return Given()
    if isinstance(label, One):
        return Given(row=label.request)
    if not isinstance(label, Own) or label.perm is not None:
        return None
    periods = divide(flow.shape(node)[label.dim], label.rows * flow.batch)
    return None if periods is None or not periods.is_Integer else Given(label.dim, int(periods))
