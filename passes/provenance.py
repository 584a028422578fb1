"""Which request each row of a site belongs to, proved on the graph and put in the op's arguments.

    x (d0, ..., dk, K) owned at dimension d with period ρ:   row m of x.view(-1, K) belongs to
    request (m // R) mod n,  R = ρ · ∏ sizes after d without K

becomes rows = R. Rows owned through a permutation p get a slot each, and rows = 1 (n = len(slots)):

    slots'[m] = slots[(p[i_m] // ρ) mod n]        (i_m row m's index along the owner dimension)

Sites without a proof serve batches of one adapter only; a refusal gives the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from lorafx.errors import ProvenanceError
from lorafx.op_arguments import bound, rebind
from lorafx.ownership import indexing
from lorafx.ownership.labels import Mixed, Own
from lorafx.ownership.site_rules import input_of, row_dims
from lorafx.ownership.symbolic import ONE, BatchSymbols
from lorafx.program.context import OWN_MASK, ROWS_OF, Context, is_site
from lorafx.program.emitter import Emitter
from lorafx.program.frame import (
    Frame,
    token_inputs,
)
from lorafx.program.refusals import Refusal
from lorafx.program.row_maps import (
    ALL_ALIKE,
    Proof,
    RowMap,
    Unproved,
    batch_of,
    picks_of,
    prove_results,
    prove_tokens,
    seeds_of,
    slots_of,
)
from lorafx.torch_internals.dynamo import PlainAOTOutput

aten = torch.ops.aten


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


def check(graph: fx.Graph, fits: Iterable[fx.Node], slots: fx.Node, batch: BatchSymbols) -> None:
    """Have the graph check that masked positions take elements of their own request."""
    emitter = Emitter(graph, batch)
    for node in fits:
        x, mask, source = indexing.masked_operands(node)
        checked = emitter.call(node, OWN_MASK, x, mask, source, slots)
        node.replace_input_with(mask, checked)


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
            if not ctx.frame.slots.per_token:  # some results may depend on no request
                unrelated = BatchSymbols.of([sympy.Symbol("no_requests")])
                seeds = seeds_of(ctx.frame.by_node, unrelated)
                ctx.handover = prove_results(gm.graph, seeds, unrelated)[1]
        else:
            seeds = seeds_of(ctx.frame.by_node, batch)
            if ctx.frame.slots.per_token:
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
        if not ctx.frame.slots.per_token:
            ctx.handover.taken, ctx.handover.inputs = ctx.frame.taken, ctx.frame.handed
            ctx.handover.counted = ctx.frame.counted
            ctx.handover.writable = ctx.frame.writable
            ctx.handover.constant = constants_of(gm.graph, ctx.frame)
            ctx.handover.seen &= not proofs
        for node in [n for n in marks if isinstance(proofs[n], Unproved)]:
            if 0 in node.meta["val"].shape:  # an expert that no token chose has no rows
                proofs[node] = RowMap(ONE)
                rebind(node, rows=1)
        unit = "token" if ctx.frame.slots.per_token else "request"
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
