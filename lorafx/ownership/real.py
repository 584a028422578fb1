"""Rules for operators that run in Python, between the graphs of a model, on real tensors.

The graph's rules apply with numbers for symbols: each index along an operand's dimension counts as
a request, which the list of owners maps to one of the batch. Operators that move whole elements
(indexing by known values, concatenation, padding) are applied to the cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.ownership import pointwise, views
from lorafx.ownership.effects import (
    OVERWRITING,
    arguments_by_name,
    functional,
    graph_of_call,
    is_out,
    tensors_in,
)
from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Label, Mixed, One, Own, Pooled, Single
from lorafx.ownership.propagate import JOINS, LAID, called, checked, rule_for
from lorafx.ownership.real_labels import (
    NOBODY,
    OF_WEIGHTS,
    POOL,
    SHARED,
    UNKNOWN,
    Listed,
    Patchy,
    RealLabel,
    Shared,
    cells_of,
    joined,
    label_of_cells,
    same_owners,
    settled,
)
from lorafx.ownership.symbolic import BatchSymbols

aten = torch.ops.aten
Labels = Mapping[int, "RealLabel | None"]  # by identity of the tensor


def cells_in(value: Tensor, labels: Labels, dims: int | None = None) -> Tensor:
    """The cells of a tensor, one for each element, or for each of those of the first `dims`
    dimensions: cells of a label have size one where it is the same for all others."""
    cells = cells_of(labels[id(value)], value.dim(), value.device)
    return cells.expand(*value.shape[:dims], *cells.shape[len(value.shape[:dims]) :])


def moved_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """Apply an operator with numeric positions to the cells."""

    def cells(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cells_in(value, labels)
        return [cells(item) for item in value] if isinstance(value, (list, tuple)) else value

    return func(**{name: cells(value) for name, value in named.items()})


def padded_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    return aten.constant_pad_nd(cells_in(named["self"], labels), named["pad"], NOBODY)


def position_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """nonzero: each position belongs to the owner of its element."""
    cells = cells_in(named["self"], labels)[tuple(result.unbind(1))]
    return cells.unsqueeze(1).expand(result.shape)


def indexed_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """x[indices], x.index_select(dim, index)."""
    index = Indices.of(named, labels)
    return index.owned(cells_in(named["self"], labels, len(index.at))[index.key])


def put_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor | None:
    """x[indices] = y, or += y: y's owners at the indices; None if two differ at one of them."""
    index, source = Indices.of(named, labels), named.get("source", named.get("values"))
    dims, every = len(index.at), named["self"].dim()  # behind them owners are mostly the same
    sizes = (cells_of(labels[id(t)], t.dim(), t.device).shape for t in (named["self"], source))
    alike = all(set(shape[len(shape) - every + dims :]) <= {1} for shape in sizes)
    table = cells_in(named["self"], labels, dims if alike else None).clone()
    before = table[index.key]
    owners = cells_in(source, labels, max(source.dim() - every + dims, 0) if alike else None)
    owners = owners.expand(before.shape)
    if named.get("accumulate") or func.overloadpacket is aten.index_add:
        owners = joined(before, owners)
    owners = index.owned(owners)
    table[index.key] = owners
    return None if bool((table[index.key] != owners).any()) else table


def scattered_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """x.masked_scatter(mask, source): source's owners at the mask's positions."""
    mask = named["mask"]
    mask_cells = cells_in(mask, labels).expand(result.shape)
    mask, x = mask.expand(result.shape), cells_in(named["self"], labels).expand(result.shape)
    source = cells_in(named["source"], labels).reshape(-1)[: int(mask.sum())]
    return joined(x.masked_scatter(mask, source), mask_cells)


def taken_cells(
    func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels
) -> Tensor | None:
    """x.gather(dim, index), x.take(index): as the index, the elements' and the index's owners; None
    if a request loses all of its elements to others."""
    table = cells_in(named["self"], labels)
    taken = func(**{**named, "self": table})
    if len(taken.unique()) < len(table.unique()):
        return None
    return joined(taken, cells_in(named["index"], labels))


def scattered_along(
    func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels
) -> Tensor | None:
    """x.scatter(dim, index, source): the source's owners at the index, as `put_cells`."""
    table, dim, index = cells_in(named["self"], labels), named["dim"], named["index"]
    before, owners = table.gather(dim, index), cells_in(index, labels)
    source = named.get("src")
    if isinstance(source, Tensor):
        cells = cells_in(source, labels)
        owners = joined(owners, cells[tuple(map(slice, index.shape))])
    if func.overloadpacket is not aten.scatter or "reduce" in named:
        owners = joined(before, owners)
    table = table.scatter(dim, index, owners)
    return None if bool((table.gather(dim, index) != owners).any()) else table


def bag_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor | None:
    """embedding_bag: the common owner of each bag's indices."""
    if not all(isinstance(labels[id(named[name])], Shared) for name in ("weight", "offsets")):
        return None
    indices, offsets = named["indices"], named["offsets"]
    owners = cells_in(indices, labels)
    if isinstance(weights := named.get("per_sample_weights"), Tensor):
        owners = joined(owners, cells_in(weights, labels))
    bag = torch.searchsorted(
        offsets, torch.arange(len(indices), device=offsets.device, dtype=offsets.dtype), right=True
    )
    shape = len(result) + 2  # before the first offset, and behind the last
    least, most = (
        torch.full((shape,), NOBODY, dtype=owners.dtype, device=owners.device).scatter_reduce(
            0, bag, of, how, include_self=False
        )
        for of, how in ((owners, "amin"), (owners, "amax"))
    )
    return torch.where(least == most, most, UNKNOWN)[1 : len(result) + 1, None]


def packed_cells(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """pack_padded_sequence(x, lengths): the rows (time, batch) that lie within their lengths."""
    cells = cells_in(named["input"], labels).contiguous()
    return func(**{**named, "input": cells})[0]


class Indices:
    """A tensor's indices by dimension, masks as positions, with their owners."""

    def __init__(self, indices: Sequence[Tensor | None], labels: Labels) -> None:
        self.at: list[Tensor | None] = []
        self.cells: list[Tensor] = []
        self.masked: list[bool] = []
        for index in indices:
            if index is None:
                self.masked.append(False)
                self.at.append(None)
                self.cells.append(torch.empty(0))
                continue
            cells = cells_in(index, labels)
            if index.dtype in (torch.bool, torch.uint8):
                positions = index.nonzero().unbind(1)
                self.at.extend(positions)
                self.cells.extend([cells[tuple(positions)]] * len(positions))
                self.masked.extend([True] * len(positions))
            else:
                self.at.append(index)
                self.masked.append(False)
                # One number chooses for all, as one of Python's does, whoever it was made of.
                unknown = index.numel() == 1 and labels[id(index)] is None
                self.cells.append(torch.full_like(cells, NOBODY) if unknown else cells)

    @staticmethod
    def of(named: Mapping[str, Any], labels: Labels) -> Indices:
        if "indices" in named:
            return Indices(named["indices"], labels)
        dim = named["dim"] % max(named["self"].dim(), 1)
        return Indices([None] * dim + [named["index"]], labels)

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(slice(None) if index is None else index.long() for index in self.at)

    def owned(self, entries: Tensor) -> Tensor:
        """`entries`, the cells of table[indices], joined with the owners of the indices.

        A mask of unknown owners is neutral: it selects rows, in order, and does not change them.
        """
        dims = [dim for dim, index in enumerate(self.at) if index is not None]
        adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
        count = max(index.dim() for index in self.at if index is not None)
        trailing = entries.dim() - (dims[0] if adjacent else 0) - count
        for dim in dims:
            cells = self.cells[dim]
            cells = cells.reshape(*cells.shape, *[1] * trailing)
            if self.masked[dim]:
                cells = torch.where((cells == UNKNOWN) & (entries >= 0), NOBODY, cells)
            entries = joined(entries, cells)
        return entries


_SORTS = (aten.sort, aten.argsort)
#: The cells of a result that depend on the values of indices, by operator in its functional form.
READ_INDICES: dict[object, Callable[[Any, Mapping[str, Any], Tensor, Labels], Tensor | None]] = {
    aten.nonzero: position_cells,
    **dict.fromkeys((aten.index, aten._unsafe_index, aten.index_select), indexed_cells),
    aten.masked_scatter: scattered_cells,
    **dict.fromkeys((aten.gather, aten.take), taken_cells),
    **dict.fromkeys((aten.scatter, aten.scatter_add), scattered_along),
    aten._embedding_bag_forward_only: bag_cells,
    aten._pack_padded_sequence: packed_cells,
    **dict.fromkeys(
        (aten.index_put, aten._unsafe_index_put, aten.index_copy, aten.index_add), put_cells
    ),
}
#: Kernels that reflect or repeat borders know no integers on some devices.
_PLACED = [op for op, (move, _) in views.MOVES.items() if move is not views.last_dims_padded]
#: These and others that move whole elements.
MOVES: dict[object, Callable[[Any, Mapping[str, Any], Tensor, Labels], Tensor | None]] = {
    **dict.fromkeys((*_PLACED, *JOINS, *LAID, aten.repeat), moved_cells),
    aten.constant_pad_nd: padded_cells,
    **READ_INDICES,
}


def labels_by_signature(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: object, labels: Labels
) -> list[RealLabel | None] | None:
    """The labels of an operator's results, in the order of `tensors_in`, or of its written
    argument; None where they depend on values (`labels_by_values`). `labels` are the operands'
    before it ran."""
    outputs, twin = list(tensors_in(results)), functional(func)
    packet = twin.overloadpacket
    if twin is not func:
        outs = {a.name for a in func._schema.arguments if is_out(a)}
        kwargs = {name: value for name, value in kwargs.items() if name not in outs}
    operands = [*tensors_in(args), *tensors_in(dict(kwargs))]
    if func.overloadpacket in OVERWRITING:
        operands = operands[1:]
    inputs = [labels[id(operand)] for operand in operands]
    rule = rule_for(twin)[0]
    if rule is pointwise.unlabelled:
        return [SHARED] * len(outputs)
    # In a graph rows of no request that are joined with others count as copies for each request.
    # What is added to rows of nobody, such as those that one expert has got, is where it was put.
    joins = MOVES.get(packet) is moved_cells or packet is aten.index_add
    joins_shared = joins and any(isinstance(i, Shared) for i in inputs)
    single = alone(inputs)
    if single is not None and not (joins_shared and isinstance(single, One)):
        return [single] * len(outputs)
    if not outputs or (func._schema.is_mutable and any(map(is_out, twin._schema.arguments))):
        return [None] * len(outputs)
    known = {id(operand): labels[id(operand)] for operand in operands}
    by_rule = None if joins_shared else _by_rule(twin, args, kwargs, results, known)
    if by_rule is not None:
        return by_rule
    if packet in READ_INDICES or (packet in _SORTS and operands[0].dim() == 1):
        return None
    if packet in MOVES:
        return _moved(twin, args, kwargs, outputs, labels)
    if None not in inputs and rule in (pointwise.pointwise, pointwise.copied):
        cells = _joined_cells(operands, inputs)
        return [label_of_cells(cells.expand(output.shape)) for output in outputs]
    return [alone([settled(label) for label in inputs])] * len(outputs)


def labels_by_values(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: object, labels: Labels
) -> list[RealLabel | None]:
    """As `labels_by_signature`, for operators that read indices, or sort a vector."""
    outputs, twin = list(tensors_in(results)), functional(func)
    if twin.overloadpacket in _SORTS:
        (keys,) = tensors_in(args)
        order = cells_of(labels[id(keys)], 1, outputs[-1].device).expand(keys.shape)[outputs[-1]]
        return [label_of_cells(order)] * len(outputs)
    return _moved(twin, args, kwargs, outputs, labels)


def _moved(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor], labels: Labels
) -> list[RealLabel | None]:
    """The label of the first output; nothing is known of others."""
    named, first = arguments_by_name(func, args, kwargs), outputs[0]
    cells = MOVES[func.overloadpacket](func, named, first, labels)
    label = None if cells is None else label_of_cells(cells.expand(first.shape))
    return [label, *(None for _ in outputs[1:])]


def _joined_cells(operands: Sequence[Tensor], labels: Sequence[RealLabel | None]) -> Tensor:
    cells = cells_of(SHARED, 0, operands[0].device)
    for operand, label in zip(operands, labels, strict=True):
        cells = joined(cells, cells_of(label, operand.dim(), operand.device))
    return cells


def alone(labels: Sequence[RealLabel | None]) -> Shared | One | None:
    """The label of any result of such operands, if they have at most one owner."""
    requests = {label.request for label in labels if isinstance(label, One)}
    if len(requests) > 1 or any(not isinstance(label, (One, Shared)) for label in labels):
        return None
    if requests:
        return One(requests.pop())
    return OF_WEIGHTS if OF_WEIGHTS in labels else SHARED


# --- the rules of the graph ---


def _by_rule(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: object, labels: Labels
) -> list[RealLabel | None] | None:
    """The graph's rule, if all owned operands list the same owners, or there are only pools. Some
    rules know what becomes of operands of unknown owners."""
    owned = [label.owners for label in labels.values() if isinstance(label, Listed)]
    if not owned and POOL in labels.values():
        owned = [(NOBODY,)]
    owners = same_owners(owned)
    if owners is None or any(isinstance(label, (One, Patchy)) for label in labels.values()):
        return None
    flow = Flow(BatchSymbols.of([len(owners)]), copies=False)
    with graph_of_call(func, args, kwargs, results) as (node, operands):
        for key, operand in operands.items():
            flow.labels[operand] = _graph_label(labels.get(key))
        single = checked(node, flow, called(node, flow))
    return _real_labels(single, results, owners)


def _graph_label(label: RealLabel | None) -> Single:
    if isinstance(label, Listed):
        return Own(label.dim)
    if isinstance(label, Pooled):
        return label
    return Mixed("unknown owners") if label is None else None


def _real_labels(
    label: Label, results: object, owners: tuple[int, ...]
) -> list[RealLabel | None] | None:
    several = isinstance(results, (tuple, list))
    values: Sequence[Any] = results if several else [results]  # type: ignore[assignment]
    singles = label if isinstance(label, tuple) else (label,) * len(values)
    labels: list[RealLabel | None] = []
    for value, single in zip(values, singles, strict=True):
        if not isinstance(value, Tensor):
            continue
        if single is None:
            labels.append(SHARED)
        elif isinstance(single, Own) and single.perm is None:
            rows, size = int(single.rows), value.shape[single.dim]
            by_index = tuple(owners[i // rows % len(owners)] for i in range(size))
            labels.append(Listed(single.dim, by_index))
        elif isinstance(single, Pooled):
            labels.append(POOL)
        else:
            labels.append(One(owners[single.request]) if isinstance(single, One) else None)
    return labels if any(item is not None for item in labels) else None
