"""Makes copies per request of shared values that deltas make differ.

    y' = site(x, y), x of no request  →  copies[i] = site(x, y) with request i's delta, (n, …)

The product y is computed once. Its delta is computed for each request, and so are the nodes behind
y', by torch.vmap: op(copies)[i] = op(copies[i]). Copies end where they meet owned values or a
dimension of the requests: at an expand or repeat to their number, and at pointwise operators and
attention masks with owned operands. The result there has its previous shape. If a rule is missing,
or `provenance` cannot prove the sites' rows, the graph stays unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from lorafx.errors import ProvenanceError
from lorafx.op_arguments import bound
from lorafx.ownership.flow import Flow, called_by
from lorafx.ownership.labels import Label
from lorafx.ownership.pointwise import unlabelled
from lorafx.ownership.propagate import flow_through, rule_for
from lorafx.ownership.site_rules import input_of
from lorafx.ownership.symbolic import BatchSymbols
from lorafx.program.context import CONV_OP, EMBEDDING_OP, ROWS_OF, SITE_OP, Context, is_site
from lorafx.program.emitter import Emitter
from lorafx.program.frame import Frame, fake_value
from lorafx.program.row_maps import Unproved, batch_of, row_map, seeds_of, slots_of
from lorafx.program.vectorize import OF_LAYOUT, OTHER_TYPE, VIEWS, NoCopy, Vectorizer
from lorafx.torch_internals.graph_parts import enable_python_dispatcher, tree_leaves

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class GiveOut:
    """Shared values get a copy per request if deltas make them differ."""

    name: str = "give_out"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        batch = _batch(ctx.frame)
        if batch is None:
            return 0
        seeds = seeds_of(ctx.frame.by_node, batch)
        assume = slots_of(ctx.frame) is not None
        sites, kept = give_out(gm.graph, seeds, batch, assume=assume)
        for old, new in sites.items():
            ctx.merge([old], new, ctx.states[old][0].form)
        ctx.kept_shared.update(kept)
        return len(sites)


def give_out(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Label],
    batch: BatchSymbols,
    *,
    assume: bool = False,
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, str]]:
    """Copy, for each request, the results of sites whose x all requests share.

    `assume` as in `flow_through`. Returns replaced sites -> replacements, and unchanged sites ->
    reasons.
    """
    if not _without_requests(graph, seeds):
        return {}, {}
    flow, kept = flow_through(graph, seeds, batch, assume=assume), cast("dict[fx.Node, str]", {})
    roots = {
        node
        for node in graph.nodes
        if is_site(node) and node not in flow.copied_sites and flow.label(input_of(node)) is None
    }
    while roots:
        attempt = Attempt(graph, flow, batch, roots)
        failed = attempt.run()
        if not failed:
            failed = attempt.unproved(flow_through(graph, seeds, batch, assume=assume))
        if not failed:
            return attempt.sites, kept
        attempt.undo()
        kept.update(failed)
        roots -= failed.keys()
    return {}, kept


def _batch(frame: Frame) -> BatchSymbols | None:
    """The number of requests, if it may exceed one and slots are given per request."""
    try:
        batch = batch_of(frame)
    except ProvenanceError:
        return None
    return None if frame.slots.per_token or batch.is_one else batch


def _without_requests(graph: fx.Graph, seeds: Mapping[fx.Node, Label]) -> bool:
    """Whether some site's x depends on no request data."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if seeds.get(node) is not None:
                dependent.add(node)
        elif is_site(node) and input_of(node) not in dependent:
            return True
        elif rule_for(node.target)[0] is not unlabelled:
            dependent.update([node] if dependent.intersection(node.all_input_nodes) else [])
    return False


class Attempt:
    """A revertible rewrite of a graph for sites with a shared x: site node -> replacement."""

    def __init__(
        self, graph: fx.Graph, flow: Flow, batch: BatchSymbols, roots: set[fx.Node]
    ) -> None:
        self.graph, self.roots = graph, roots
        self.before = set(graph.nodes)
        self.vectorizer = Vectorizer(flow, Emitter(graph, batch))
        self.sites: dict[fx.Node, fx.Node] = {}
        self._roots_of: dict[fx.Node, set[fx.Node]] = {}
        # For `undo`: (user, old operand, new operand), former fake values, former targets of views.
        self._inputs: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        self._values: dict[fx.Node, object] = {}
        self._views: list[tuple[fx.Node, object]] = []

    def run(self) -> dict[fx.Node, str]:
        """Rewrite the graph; returns impossible roots -> reasons."""
        failed: dict[fx.Node, str] = {}
        for node in [node for node in self.graph.nodes if node in self.before]:
            shared = [arg for arg in node.all_input_nodes if arg in self.vectorizer.copies]
            if not shared and node not in self.roots:
                continue
            own_root = {node} & self.roots
            self._roots_of[node] = own_root.union(*(self._roots_of[arg] for arg in shared))
            try:
                self._visit(node, shared)
            except NoCopy as error:
                failed.update(dict.fromkeys(self._roots_of[node], str(error)))
        if not failed:
            try:
                self._update_values()
            except NoCopy as error:
                failed = dict.fromkeys(self.roots, str(error))
        return failed

    def _visit(self, node: fx.Node, shared: list[fx.Node]) -> None:
        vectorizer = self.vectorizer
        vectorizer.before = node
        if node.op != "call_function":
            raise NoCopy(node, "it is returned once for all requests")
        label = vectorizer.flow.labels[node]
        if is_site(node):
            if node.target not in (SITE_OP, EMBEDDING_OP, CONV_OP) or label is not None:
                raise NoCopy(node, "no rule copies what this operator computes")
            new = self.sites[node] = vectorizer.site(node)
            images = node.target is CONV_OP
            vectorizer.copies[node] = vectorizer.of_requests(new) if images else new
        elif rule_for(node.target)[0] is unlabelled and fake_value(node) is not None:
            for arg in shared:  # only its sizes are read
                copy = vectorizer.emit(aten.select.int, vectorizer.copies[arg], 0, 0)
                self._replace_operand(node, arg, copy)
        elif node.target is ROWS_OF:
            y = bound(node)["y"]
            if y in vectorizer.copies:
                vectorizer.copies[node] = vectorizer.copies[y]
        elif label is not None and not _is_shared(label):
            product = vectorizer.product_by_request(node)
            if product is not None:
                for user in list(product[0].users):
                    self._replace_operand(user, *product)
                return
            for arg, new in vectorizer.operands_by_owner(node):
                self._replace_operand(node, arg, new)
        else:
            repeated = vectorizer.repeated_by_size(node)
            if repeated is None:
                vectorizer.copies[node] = vectorizer.vectorized(node)
            elif _types(fake_value(repeated)) != _types(fake_value(node)):
                raise NoCopy(node, OTHER_TYPE)
            else:
                for user in list(node.users):
                    self._replace_operand(user, node, repeated)

    def _replace_operand(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        user.replace_input_with(old, new)
        self._inputs.append((user, old, new))

    def _update_values(self) -> None:
        """Update later nodes' fake values; views that need the old strides become reshapes."""
        changed = {
            new
            for _, old, new in self._inputs
            if _layouts(new.meta["val"]) != _layouts(old.meta["val"])
        }
        for node in self.graph.nodes:
            if node not in self.before or not changed.intersection(node.all_input_nodes):
                continue
            if node.op == "output" or called_by(node) in OF_LAYOUT:
                raise NoCopy(node, "its layout would change")
            old = fake_value(node)
            try:
                value = self._computed(node)
            except RuntimeError as error:
                if node.target not in VIEWS:
                    raise NoCopy(node, f"its layout would change: {error}") from error
                self._views.append((node, node.target))
                node.target = aten.reshape.default
                value = self._computed(node)
            if _types(value) != _types(old):
                raise NoCopy(node, OTHER_TYPE)
            self._values.setdefault(node, old)
            node.meta["val"] = value
            if _layouts(value) != _layouts(old):
                changed.add(node)

    def _computed(self, node: fx.Node) -> object:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), fake_value)
        with enable_python_dispatcher(), self.vectorizer.emitter.fake_mode or nullcontext():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def unproved(self, flow: Flow) -> dict[fx.Node, str]:
        """Roots of sites whose rows the ordinary rules do not prove -> reasons."""
        failed: dict[fx.Node, str] = {}
        for old, new in self.sites.items():
            proof = row_map(new, flow)
            if isinstance(proof, Unproved):
                failed.update(
                    dict.fromkeys(
                        self._roots_of[old],
                        "with one copy per request its row ownership is still not proved",
                    )
                )
        return failed

    def undo(self) -> None:
        for node, target in self._views:
            node.target = target  # type: ignore[assignment]
        for node, value in self._values.items():
            node.meta["val"] = value
        for user, old, new in reversed(self._inputs):
            user.replace_input_with(new, old)
        for node in reversed(list(self.graph.nodes)):
            if node not in self.before:
                self.graph.erase_node(node)


def _is_shared(label: Label) -> bool:
    return isinstance(label, tuple) and all(output is None for output in label)


def _types(value: object) -> object:
    return [getattr(output, "dtype", None) for output in tree_leaves(value)]


def _layouts(value: object) -> object:
    tensors = (output for output in tree_leaves(value) if isinstance(output, torch.Tensor))
    return [(tuple(map(str, t.shape)), tuple(map(str, t.stride()))) for t in tensors]
