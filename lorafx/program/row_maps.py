"""Which request each row of a site belongs to, proved from the labels of a graph's inputs.

inputs of a frame ── seeds_of ─▶ labels ── flow ─▶ label of a site's x ── row_map ─▶ RowMap
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch import fx

from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Label, Mixed, One, Own
from lorafx.ownership.propagate import flow_through
from lorafx.ownership.runs import Runs
from lorafx.ownership.site_rules import input_of, row_dims
from lorafx.ownership.symbolic import ONE, BatchSymbols, Sizes, product
from lorafx.ownership.tokens import Alignment
from lorafx.program.context import is_site
from lorafx.program.frame import (
    ONE_SLOT,
    Frame,
    batch_symbols,
    fake_value,
    numbers_of_choices,
    repeated_sizes,
)
from lorafx.program.inputs import FrameInput
from lorafx.program.row_handoff import Handover, results_of

aten = torch.ops.aten


#: `rows` of a site without a row map: all rows belong to the first request, which is right if all
#: requests use one adapter, or none of theirs touches the site; a refusal stops other batches. It
#: is an int64 beyond any number of rows.
ALL_ALIKE = 1 << 62


@dataclass(frozen=True)
class RowMap:
    """Row m belongs to request (m // period) mod n. With `perm`, index i along dimension `dim` of
    the rows belongs to request (perm[i] // period) mod n. With `request`, all rows belong to it."""

    period: sympy.Expr
    perm: fx.Node | Runs | None = None
    dim: int = 0
    request: int | None = None

    def words(self, unit: str) -> str:
        """The map in words; `unit` is "request" or "token", each of which has a slot."""
        if self.request is not None:
            return f"rows of request {self.request} alone"
        via = f" through {self.perm.name}" if self.perm is not None else ""
        return f"{self.period} {'row' if self.period == 1 else 'rows'} for each {unit}{via}"


@dataclass(frozen=True)
class Unproved:
    """Why no row map is known."""

    reason: str


Proof: TypeAlias = RowMap | Unproved


def prove_results(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Label],
    batch: BatchSymbols,
    *,
    assume: bool = False,
    picks: Iterable[fx.Node] = (),
) -> tuple[dict[fx.Node, Proof], Handover, list[fx.Node]]:
    """The row map of each site node, or why there is none; the owners of the graph's results; and,
    with `assume`, the nodes whose masks the graph must check at run time, since proofs depend on
    them. `picks`: inputs whose values are indices of requests."""
    sites = [node for node in graph.nodes if is_site(node)]
    if batch.is_one:
        return {node: RowMap(ONE) for node in sites}, Handover(), []
    flow = flow_through(graph, seeds, batch, assume=assume, picks=picks)
    proofs = {node: row_map(node, flow) for node in sites}
    return proofs, results_of(graph, flow), flow.fits


def prove_tokens(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Label],
    batch: BatchSymbols,
    token_inputs: Mapping[fx.Node, int],
) -> dict[fx.Node, Proof]:
    """The row map of each site node to slots (B·T,), one per token, or why there is none.
    `token_inputs`: inputs with one entry per token -> the dimension of the tokens."""
    lengths = [fake_value(node).shape[dim] for node, dim in token_inputs.items()]
    sites = [node for node in graph.nodes if is_site(node)]
    if not lengths:
        return {node: Unproved("no input of this graph has one entry per token") for node in sites}
    flow = flow_through(graph, seeds, batch)
    places = Alignment(graph, flow, BatchSymbols.of(lengths), token_inputs)
    proofs: dict[fx.Node, Proof] = {}
    for node in sites:
        x = input_of(node)
        period = places.rows_in_order(x, flow.label(x), row_dims(node))
        proofs[node] = (
            Unproved("it is not proved that its rows are the tokens of the requests in order")
            if period is None
            else RowMap(period)
        )
    return proofs


def row_map(node: fx.Node, flow: Flow) -> Proof:
    """The map of a site from the label of its x or ids."""
    x = input_of(node)
    label, shape = flow.label(node if node in flow.copied_sites else x), flow.shape(x)
    ndim = row_dims(node)
    if isinstance(label, Mixed):
        return Unproved(label.reason)
    if isinstance(label, One):
        return RowMap(ONE, request=label.request)
    if not isinstance(label, Own):
        return Unproved("its rows are shared by all requests: x depends on none of them")
    if label.dim >= ndim:
        return Unproved(f"the requests lie along the features of x: {label}")
    if isinstance(label.perm, Runs) and not label.perm.complete:
        return Unproved("some of its rows belong to no request")
    if label.perm is not None:
        return RowMap(label.rows, label.perm, label.dim)
    return RowMap(label.rows * product(shape[label.dim + 1 : ndim]))


_OF_THE_CALL = ("argument", "result", "unknown")


def seeds_of(inputs: Mapping[fx.Node, FrameInput], batch: BatchSymbols) -> dict[fx.Node, Label]:
    """The labels of the graph's inputs, by their meaning in the frame."""
    sizes = Sizes(batch)
    seeds: dict[fx.Node, Label] = {}
    for node, item in inputs.items():
        value = fake_value(node)
        if not isinstance(value, torch.Tensor) or item.kind not in _OF_THE_CALL:
            seeds[node] = None
        elif item.kind == "unknown" or item.role is None or not item.role.known:
            seeds[node] = Mixed(f"it is not known which requests the input {item.label} belongs to")
        elif item.role.request is not None:
            seeds[node] = One(item.role.request)
        elif item.role.dim is None or (
            sizes.shape(value)[item.role.dim] == ONE and not batch.is_one
        ):
            seeds[node] = None  # shared by all requests
        elif item.role.several:
            seeds[node] = Own(item.role.dim, batch.share(value.shape[item.role.dim]))
        else:
            seeds[node] = Own(item.role.dim)
    return seeds


def batch_of(frame: Frame) -> BatchSymbols:
    """The number of requests in this frame's graph. Raises what `batch_symbols` raises."""
    return BatchSymbols.of(batch_symbols(frame), repeated_sizes(frame), numbers_of_choices(frame))


def slots_of(frame: Frame) -> fx.Node | None:
    """The input that holds the slots of the requests, if any."""
    items = frame.by_node.items()
    return next((n for n, item in items if item.kind == "slots" and item.label != ONE_SLOT), None)


def picks_of(frame: Frame) -> list[fx.Node]:
    """The inputs whose values are indices of requests."""
    items = frame.by_node.items()
    return [node for node, item in items if item.role is not None and item.role.picks]
