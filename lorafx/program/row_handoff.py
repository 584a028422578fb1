"""Owners of tensors that one captured graph of a call passes to the next.

The call's memory holds the labels of results, from `provenance`'s proofs, and of tensors that
Python made between graphs (`lorafx/eager/following.py`). A proof holds in a call in which index i
of every input belongs to the same request, or all inputs belong to a single request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor, fx

from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import One, Own
from lorafx.ownership.memory import Memory, storage_of
from lorafx.ownership.real import alone
from lorafx.ownership.real_labels import (
    NOBODY,
    SHARED,
    Listed,
    RealLabel,
    Shared,
    listed,
    repeated_owners,
    same_owners,
    settled,
)
from lorafx.ownership.symbolic import divide
from lorafx.program.argument_roles import Role, RoleTable, tensor_leaves
from lorafx.torch_internals.dynamo import InputMutationAOTOutput, PlainAOTInput, PlainAOTOutput

_RESULT = "a result of an earlier graph"


@dataclass(frozen=True)
class OfList:
    """Index i of the inputs of a graph's proof belongs to row owners[i] of the batch."""

    owners: tuple[int, ...]
    in_order: bool = False


#: The owners of a graph's rows in a call, if known.
Rows: TypeAlias = OfList | One


def role_of(label: RealLabel | None) -> Role | None:
    """The role of a tensor with this label for a new graph."""
    label = settled(label)
    if isinstance(label, Shared):
        return Role(_RESULT, None)
    if isinstance(label, Listed):
        return Role(_RESULT, label.dim)
    return Role(_RESULT, 0) if isinstance(label, One) else None


def argument_label(role: Role, tensor: Tensor, requests: int) -> RealLabel | None:
    """The label of an argument by its role."""
    if not role.known:
        return None
    if role.request is not None:
        return One(role.request)
    if role.dim is None:
        return SHARED
    size = tensor.shape[role.dim] if role.dim < tensor.dim() else 0
    if size == requests:
        return listed(role.dim, tuple(range(requests)))
    return SHARED if size == 1 else None


def label_arguments(
    memory: Memory,
    roles: RoleTable,
    named: Mapping[str, Any],
    requests: int,
    copies: Mapping[int, Tensor] = MappingProxyType({}),
) -> None:
    """Label the tensors among a call's arguments, or the copies that the call gets, by identity."""
    seen: set[int] = set()  # a cache may hold other arguments, which have roles of their own
    for name, value in named.items():
        for tensor in tensor_leaves(value):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                role = roles.role(name, tensor, named)
                label = argument_label(role, tensor, requests)
                memory.set_label(copies.get(id(tensor), tensor), label)


@dataclass(frozen=True)
class ResultOwners:
    """Index i of a result along `dim`, with `periods` · n · R entries, belongs to row (i // R) mod
    n of the graph's n rows. Without `dim` the result depends only on `row`, or on no request."""

    dim: int | None = None
    periods: int = 1
    row: int | None = None

    def label(self, tensor: Tensor, rows: Rows | None) -> RealLabel | None:
        if isinstance(rows, One):
            return rows
        if rows is not None and self.row is not None:
            return listed(0, rows.owners[self.row : self.row + 1])
        if rows is None or self.dim is None:
            return None if rows is None else SHARED
        size = tensor.shape[self.dim]
        owners = rows.owners
        step, remainder = divmod(size, self.periods * len(owners))
        if remainder or not step:
            return None
        if step == self.periods == 1:
            return listed(self.dim, owners)
        return listed(self.dim, tuple(owners[i // step % len(owners)] for i in range(size)))


def in_order_of(requests: int) -> OfList:
    """The rows of a graph in which index i belongs to row i of the batch."""
    return OfList(tuple(range(requests)), in_order=True)


@dataclass
class Handover:
    """What a graph's proofs assume about tensors of earlier graphs, and the owners of its results.

    Attributes:
        inputs: positions of inputs that may hold data of requests.
        taken: the roles that proofs assume for tensors from earlier graphs or Python, by position.
        counted: positions of their sizes that count as the number of rows.
        writable: positions of the model's tensors that may have been written before.
        results: owners of results, by position.
        written: owners of inputs after the graph's writes, by position.
        seen: the graph has unproved values and no sites; tracked calls run it operator by operator.
        fresh: the graph has not run yet; the next captured graph may need its results.
        constant: positions of results that depend on no request and no adapter -> positions of the
            model's tensors from which they are computed.
    """

    inputs: tuple[int, ...] = ()
    taken: dict[int, Role] = field(default_factory=dict)
    counted: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    results: dict[int, ResultOwners] = field(default_factory=dict)
    written: dict[int, ResultOwners | None] = field(default_factory=dict)
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
        """The owners of rows in a call with arguments of roles `of_call`; None if proofs fail
        there."""
        rows = self._rows(memory, arguments, requests, of_call)
        if isinstance(rows, OfList) and any(
            arguments[position] != len(rows.owners) for position in self.counted
        ):
            return None
        for position in self.writable:
            label = memory.look(arguments[position])  # type: ignore[arg-type]
            if not isinstance(label, Shared) and label != rows:
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
        labels: dict[int, RealLabel | None] = {}
        for position in (*self.inputs, *self.taken):
            tensor = arguments[position]
            known = memory.look(tensor) if isinstance(tensor, Tensor) else None
            labels[position] = settled(known)
        request = alone(list(labels.values()))
        if isinstance(request, One):
            return request
        lists: list[tuple[int, ...]] = []
        repeated: list[tuple[int, ...]] = []
        single: list[tuple[Role, One]] = []
        for position, role in self.taken.items():
            label, tensor = labels[position], arguments[position]
            if role.request is not None:
                if not isinstance(label, One):
                    return None
                single.append((role, label))
                continue
            if role.dim is None and isinstance(label, Shared):
                continue
            if isinstance(label, Listed) and label.dim == role.dim:
                (repeated if role.several else lists).append(label.owners)
            elif role.several:
                return None
            elif isinstance(label, One) and isinstance(tensor, Tensor) and role.dim is not None:
                lists.append((label.request,) * tensor.shape[role.dim])
            else:
                return None
        owners = same_owners(lists) if lists else tuple(range(requests))
        if owners is None or any(item != repeated_owners(owners, item) for item in repeated):
            return None
        for role, only in single:
            assert role.request is not None
            if role.requests != len(owners) or owners[role.request] != only.request:
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
        """Record labels of results and written inputs, only proved ones if tracked
        (`looked_at`)."""
        for position, proof in self.written.items():
            tensor = arguments[position]
            if isinstance(tensor, Tensor) and not looked_at:
                memory.write(tensor, _label(proof, tensor, rows))
        if not isinstance(results, (list, tuple)):
            return
        inputs: dict[int | None, list[Tensor]] = {}
        for item in arguments:
            if isinstance(item, Tensor):
                inputs.setdefault(storage_of(item), []).append(item)
        for position, tensor in enumerate(results):
            if not isinstance(tensor, Tensor):
                continue
            label = _label(self.results.get(position), tensor, rows)
            if label is not None or not looked_at:
                memory.note(tensor, label, inputs.get(storage_of(tensor), ()))


def _label(proof: ResultOwners | None, tensor: Tensor, rows: Rows | None) -> RealLabel | None:
    if proof is None:
        return rows if isinstance(rows, One) else None
    return proof.label(tensor, rows)


def results_of(graph: fx.Graph, flow: Flow) -> Handover:
    """The owners of a graph's results, from provenance's labels."""
    handover = Handover()
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = output.args[0]
    if not isinstance(results, (list, tuple)):  # AOTAutograd always returns a tuple
        results = (results,)
    for node, description in zip(results, output.meta.get("desc") or (), strict=False):
        if not isinstance(node, fx.Node):
            continue
        proof = _result_owners(node, flow)
        handover.seen |= proof is None
        if isinstance(description, PlainAOTOutput) and proof is not None:
            handover.results[description.idx] = proof
        elif isinstance(description, InputMutationAOTOutput):
            target = description.mutated_input
            if isinstance(target, PlainAOTInput):
                handover.written[target.idx] = proof
    return handover


def _result_owners(node: fx.Node, flow: Flow) -> ResultOwners | None:
    label = flow.labels.get(node, ())
    if label is None:
        return ResultOwners()
    if isinstance(label, One):
        return ResultOwners(row=label.request)
    if not isinstance(label, Own) or label.perm is not None:
        return None
    count = divide(flow.shape(node)[label.dim], label.rows * flow.batch)
    return None if count is None or not count.is_Integer else ResultOwners(label.dim, int(count))
