"""Which request each row of a site belongs to, proved on the graph and put in the op's arguments.

    x (d0, ..., dk, K) owned at dimension d with period ρ:   row m of x.view(-1, K) belongs to
    request (m // R) mod n,  R = ρ · ∏ sizes after d without K

becomes rows = R. Rows owned through a permutation p get a slot each, and rows = 1 (n = len(slots)):

    slots'[m] = slots[(p[i_m] // ρ) mod n]        (i_m row m's index along the owner dimension)

Sites without a proof serve batches of one adapter only; a refusal gives the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from lorafx.errors import ProvenanceError
from lorafx.op_arguments import bound, rebind
from lorafx.ownership import indexing
from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Label, Mixed, One, Own
from lorafx.ownership.propagate import flow_through
from lorafx.ownership.runs import Runs
from lorafx.ownership.site_rules import input_of, row_dims
from lorafx.ownership.symbolic import ONE, BatchSymbols, Sizes, as_expr, product
from lorafx.ownership.tokens import Alignment
from lorafx.program.context import OWN_MASK, ROWS_OF, Context, Refusal, is_site
from lorafx.program.frame import (
    ONE_SLOT,
    Frame,
    FrameInput,
    batch_symbols,
    fake_value,
    numbers_of_choices,
    repeated_sizes,
    token_inputs,
)
from lorafx.program.row_handoff import Handover, results_of
from lorafx.torch_internals import graph_parts
from lorafx.torch_internals.dynamo import PlainAOTOutput
from lorafx.torch_internals.graph_parts import detect_fake_mode, enable_python_dispatcher

aten = torch.ops.aten


_FUNCTIONS: tuple[tuple[type, Callable[..., Any]], ...] = (
    (sympy.Mul, operator.mul),
    (sympy.Add, operator.add),
    (graph_parts.FloorDiv, operator.floordiv),
    (graph_parts.Mod, operator.mod),
    (graph_parts.PythonMod, operator.mod),
    (graph_parts.IntTrueDiv, operator.truediv),
    (graph_parts.CeilToInt, math.ceil),
    (graph_parts.FloorToInt, math.floor),
    (graph_parts.TruncToInt, math.trunc),
    (graph_parts.Max, torch.sym_max),
    (graph_parts.Min, torch.sym_min),
)


class Emitter:
    """Adds nodes to a graph, equal ones once; `before` must not move backwards between calls."""

    def __init__(self, graph: fx.Graph, batch: BatchSymbols) -> None:
        self.graph = graph
        self.sizes = Sizes(batch)
        self._sizes: dict[sympy.Expr, Any] = {}
        self._slots: dict[tuple[Any, ...], fx.Node] = {}
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.fake_mode = detect_fake_mode(
            [n.meta["val"] for n in self._inputs if isinstance(n.meta.get("val"), torch.Tensor)]
        )
        # Data-dependent sizes, which exist after the node that computes them.
        self._computed: dict[sympy.Expr, fx.Node] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                nodes = self._sizes if node.op == "placeholder" else self._computed
                nodes.setdefault(self.sizes.unify(value.node.expr), node)
                nodes.setdefault(value.node.expr, node)  # unified expressions may contain it

    def call(
        self, before: fx.Node, target: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if self.fake_mode is None:
            node.meta["val"] = target(*values[0], **values[1])
        else:
            # C++ kernels may specialise on the current value of a size.
            with enable_python_dispatcher(), self.fake_mode:
                node.meta["val"] = target(*values[0], **values[1])
        return node

    def size(self, expr: sympy.Expr, before: fx.Node) -> Any:
        """An int, or a node that computes `expr`; None if the graph cannot compute a symbol."""
        if expr.is_Integer:
            return int(expr)
        if expr in self._sizes:
            return self._sizes[expr]
        node = self._symbol(expr, before) if expr.is_Symbol else self._compound(expr, before)
        if node is not None:
            self._sizes[expr] = node
        return node

    def _symbol(self, symbol: sympy.Expr, before: fx.Node) -> Any:
        for source in self._inputs:
            value = source.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            for dim, size in enumerate(value.shape):
                if self.sizes.unify(as_expr(size)) == symbol:
                    return self.call(before, aten.sym_size.int, source, dim)
        return self._computed.get(symbol)

    def _compound(self, expr: sympy.Expr, before: fx.Node) -> Any:
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            target, parts = operator.mul, [expr.base] * int(expr.exp)
        else:
            function = next((fn for kind, fn in _FUNCTIONS if isinstance(expr, kind)), None)
            if function is None:
                return None
            target, parts = function, list(expr.args)
        total = None
        for part in parts:
            value = self.size(part, before)
            if value is None:
                return None
            if total is None:
                total = value
            elif isinstance(total, int) and isinstance(value, int):
                total = target(total, value)
            else:
                total = self.call(before, target, total, value)
        return total if len(parts) > 1 else self.call(before, target, total)

    def slot_of(self, slots: fx.Node, request: int, before: fx.Node) -> fx.Node:
        key = (slots, request)
        if key not in self._slots:
            slot = self.call(before, aten.select.int, slots, 0, request)
            self._slots[key] = self.call(before, aten.unsqueeze.default, slot, 0)
        return self._slots[key]

    def row_slots(
        self, slots: fx.Node, label: Own, x: fx.Node, ndim: int, before: fx.Node
    ) -> fx.Node | None:
        """slots'[m] for each row of x, over its first `ndim` dimensions."""
        step = self.size(label.rows, before)
        if step is None:
            return None
        shape = tuple(self.sizes.shape(x.meta["val"])[:ndim])
        key = (slots, label, shape)
        if key not in self._slots:
            count = self.size_of(slots, 0, before)
            perm = self._positions(label.perm, slots, before)
            if perm is None:
                return None
            owner = self.call(before, aten.div.Scalar_mode, perm, step, rounding_mode="floor")
            owner = self.call(before, aten.remainder.Scalar, owner, count)
            entries = self.call(before, aten.index.Tensor, slots, [owner])
            self._slots[key] = self._by_row(entries, x, label.dim, ndim, before)
        return self._slots[key]

    def _positions(self, perm: Any, slots: fx.Node, before: fx.Node) -> fx.Node | None:
        """The vector of positions; None if the graph cannot compute their ends."""
        if not isinstance(perm, Runs):
            return perm
        parts: list[fx.Node] = []
        kind = {"dtype": torch.int64, "device": slots.meta["val"].device}
        for run in perm.runs:
            ends = (run.start, run.at(run.size), run.step)
            start, end, step = (self.size(sympy.sympify(end), before) for end in ends)
            size = self.size(run.size, before)
            if start is None or end is None or step is None or size is None:
                return None
            if run.step == 0:
                parts.append(self.call(before, aten.full.default, [size], start, **kind))
            else:
                call = self.call
                parts.append(call(before, aten.arange.start_step, start, end, step, **kind))
        return parts[0] if len(parts) == 1 else self.call(before, aten.cat.default, parts)

    def size_of(self, node: fx.Node, dim: int, before: fx.Node) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(before, aten.sym_size.int, node, dim)

    def _by_row(self, items: fx.Node, x: fx.Node, dim: int, ndim: int, before: fx.Node) -> fx.Node:
        """An entry for each row of x, from `items` (N,) along dimension `dim` of x."""
        if ndim == 1:
            return items
        shape = [self.size_of(x, d, before) for d in range(ndim)]
        sizes = [1] * dim + [shape[dim]] + [1] * (ndim - 1 - dim)
        rows = self.call(before, aten.view.default, items, sizes)
        rows = self.call(before, aten.expand.default, rows, shape)
        rows = self.call(before, aten.clone.default, rows, memory_format=torch.contiguous_format)
        return self.call(before, aten.view.default, rows, [-1])


#: `rows` of a site without a row map: all rows belong to the first request, which is right if all
#: requests use one adapter, or none of theirs touches the site; a refusal stops other batches.
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


def apply(
    graph: fx.Graph, proofs: Mapping[fx.Node, Proof], batch: BatchSymbols
) -> dict[fx.Node, Proof]:
    """Write proved maps into the `slots` and `rows` arguments of their site nodes. Returns the
    proofs; a map whose sizes the graph cannot compute is then unproved."""
    emitter, applied = Emitter(graph, batch), dict(proofs)
    for node in [node for node in graph.nodes if node in proofs]:
        proof = proofs[node]
        if isinstance(proof, Unproved):
            continue
        slots = bound(node)["slots"]
        if proof.request is not None:
            slots, rows = emitter.slot_of(slots, proof.request, node), 1
        elif proof.perm is None:
            rows = emitter.size(proof.period, node)
        else:
            x, rows = input_of(node), 1
            label = Own(proof.dim, proof.period, proof.perm)
            slots = emitter.row_slots(slots, label, x, row_dims(node), node)
        if slots is None or rows is None:
            applied[node] = Unproved(f"the graph cannot compute the size {proof.period}")
            continue
        rebind(node, slots=slots, rows=rows)
    return applied


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


def check(graph: fx.Graph, fits: Iterable[fx.Node], slots: fx.Node, batch: BatchSymbols) -> None:
    """Have the graph check that masked positions take elements of their own request."""
    emitter = Emitter(graph, batch)
    for node in fits:
        x, mask, source = indexing.masked_operands(node)
        checked = emitter.call(node, OWN_MASK, x, mask, source, slots)
        node.replace_input_with(mask, checked)


def slots_of(frame: Frame) -> fx.Node | None:
    """The input that holds the slots of the requests, if any."""
    items = frame.by_node.items()
    return next((n for n, item in items if item.kind == "slots" and item.label != ONE_SLOT), None)


def picks_of(frame: Frame) -> list[fx.Node]:
    """The inputs whose values are indices of requests."""
    items = frame.by_node.items()
    return [node for node, item in items if item.role is not None and item.role.picks]


def constants_of(graph: fx.Graph, frame: Frame) -> dict[int, tuple[int, ...]]:
    """Position of a result that depends only on sizes, and on tensors of the model that are no
    site's -> the positions of those tensors."""
    positions = {id(item): position for position, item in enumerate(frame.inputs)}
    sources: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            item = frame.by_node.get(node)
            if item is None:
                continue
            if item.kind == "state" and item.holder is not None and id(item) in positions:
                sources[node] = frozenset([positions[id(item)]])
            elif item.kind == "symbol":
                sources[node] = frozenset()
        elif node.op == "call_function" and all(i in sources for i in node.all_input_nodes):
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded not in tags:
                sources[node] = frozenset().union(*(sources[i] for i in node.all_input_nodes))
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = zip(output.args[0], output.meta.get("desc") or (), strict=False)
    return {
        desc.idx: tuple(sources[node])
        for node, desc in results
        if isinstance(desc, PlainAOTOutput)
        and node in sources
        and node.op != "placeholder"
        and isinstance(node.meta["val"], torch.Tensor)
    }


@dataclass(frozen=True)
class Provenance:
    """Which request each row of a site belongs to, proved on the graph."""

    name: str = "provenance"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        marks: Iterable[fx.Node] = [node for node in gm.graph.nodes if is_site(node)]
        try:
            batch = batch_of(ctx.frame)
        except ProvenanceError as error:
            proofs: dict[fx.Node, Proof] = {node: Unproved(str(error)) for node in marks}
            if not ctx.frame.per_token:  # some results may depend on no request
                unrelated = BatchSymbols.of([sympy.Symbol("no_requests")])
                seeds = seeds_of(ctx.frame.by_node, unrelated)
                ctx.handover = prove_results(gm.graph, seeds, unrelated)[1]
        else:
            seeds = seeds_of(ctx.frame.by_node, batch)
            if ctx.frame.per_token:
                # Labels of results of earlier graphs name requests, not tokens.
                earlier = Mixed("it comes from an earlier graph")
                items = ctx.frame.by_node.items()
                seeds.update({node: earlier for node, item in items if item.kind == "result"})
                proofs = prove_tokens(gm.graph, seeds, batch, token_inputs(ctx.frame))
            else:
                slots = slots_of(ctx.frame)
                assume, picks = slots is not None, picks_of(ctx.frame)
                proved = prove_results(gm.graph, seeds, batch, assume=assume, picks=picks)
                proofs, ctx.handover, fits = proved
                if slots is not None:
                    check(gm.graph, fits, slots, batch)
            proofs = apply(gm.graph, proofs, batch)
        if not ctx.frame.per_token:
            ctx.handover.taken, ctx.handover.inputs = ctx.frame.taken, ctx.frame.handed
            ctx.handover.counted = ctx.frame.counted
            ctx.handover.writable = ctx.frame.writable
            ctx.handover.constant = constants_of(gm.graph, ctx.frame)
            ctx.handover.seen &= not proofs
        unit = "token" if ctx.frame.per_token else "request"
        for node, proof in proofs.items():
            for state in ctx.states.get(node, ()):
                state.rows = (
                    proof.words(unit)
                    if isinstance(proof, RowMap)
                    else f"no row map: {proof.reason}"
                )
            if isinstance(proof, Unproved):
                sites = tuple(state.site for state in ctx.states.get(node, ()))
                reason = proof.reason
                if node in ctx.kept_shared:
                    reason += (
                        f". One copy per request was tried, and ended at {ctx.kept_shared[node]}"
                    )
                ctx.refuse(Refusal(sites, "mixed", reason))
                rebind(node, rows=ALL_ALIKE)
        for node in [node for node in gm.graph.nodes if node.target is ROWS_OF]:
            node.replace_all_uses_with(bound(node)["y"])
            gm.graph.erase_node(node)
        return sum(isinstance(proof, RowMap) for proof in proofs.values())
