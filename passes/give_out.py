"""Gives each request a copy of shared values where deltas make them differ.

    y' = site(x, y), x of no request  →  copies[i] = site(x, y) with request i's delta, (n, …)

The product y is computed once, its deltas for each request, and so are the nodes behind y', up to
where they meet owned values (`ownership/vectorize.py`). If `provenance` cannot prove the sites'
rows then, or a rule is missing, the graph is left unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from lorafx.errors import ProvenanceError
from lorafx.op_arguments import bound
from lorafx.ownership.emit import Emitter
from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Label
from lorafx.ownership.pointwise import unlabelled
from lorafx.ownership.propagate import called_by, flow_through, rule_for
from lorafx.ownership.site_rules import input_of
from lorafx.ownership.symbolic import BatchSymbols
from lorafx.ownership.vectorize import OTHER_TYPE, Ended, Vectorizer
from lorafx.passes.provenance import Unproved, batch_of, row_map, seeds_of, slots_of
from lorafx.program.context import EMBEDDING_OP, ROWS_OF, SITE_OP, Context, is_site
from lorafx.program.frame import Frame, fake_value
from lorafx.torch_internals.fake_tensors import enable_python_dispatcher

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)
#: Operators whose results depend on the operand's layout.
OF_LAYOUT = (
    *(aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter),
    *(aten.sym_stride, aten.sym_storage_offset),
)


@dataclass(frozen=True)
class GiveOut:
    """Values that all requests share get a copy for each request where deltas make them differ."""

    name: str = "give_out"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        batch = _batch(ctx.frame)
        if batch is None:
            return 0
        seeds = seeds_of(ctx.frame.by_node, batch)
        assume = slots_of(ctx.frame) is not None
        sites, kept = give_out(gm.graph, seeds, batch, ctx.take_edit, assume=assume)
        for old, new in sites.items():
            ctx.merge([old], new, ctx.states[old][0].form)
        ctx.kept_shared.update(kept)
        return len(sites)


def give_out(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Label],
    batch: BatchSymbols,
    allowed: Callable[[], bool] = lambda: True,
    *,
    assume: bool = False,
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, str]]:
    """Copy, for each request, the results of sites whose x all requests share.

    `allowed` is called for each site; `assume` as in `flow_through`. Returns replaced sites ->
    replacements, and unchanged sites -> reasons.
    """
    if not _without_requests(graph, seeds):
        return {}, {}
    flow, kept = flow_through(graph, seeds, batch, assume=assume), cast("dict[fx.Node, str]", {})
    roots = {
        node
        for node in graph.nodes
        if is_site(node) and node not in flow.given and flow.label(input_of(node)) is None
    }
    roots = {node for node in roots if allowed()}
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
    """The number of requests, if several are possible and slots are per request."""
    try:
        batch = batch_of(frame)
    except ProvenanceError:
        return None
    return None if frame.per_token or batch.is_one else batch


def _without_requests(graph: fx.Graph, seeds: Mapping[fx.Node, Label]) -> bool:
    """Whether some site's x depends on no request data."""
    theirs: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if seeds.get(node) is not None:
                theirs.add(node)
        elif is_site(node) and input_of(node) not in theirs:
            return True
        elif rule_for(node.target)[0] is not unlabelled:
            theirs.update([node] if theirs.intersection(node.all_input_nodes) else [])
    return False


class Attempt:
    """A revertible rewrite of a graph for sites with a shared x: site node -> replacement."""

    def __init__(
        self, graph: fx.Graph, flow: Flow, batch: BatchSymbols, roots: set[fx.Node]
    ) -> None:
        self.graph, self.roots = graph, roots
        self.before = set(graph.nodes)
        self.vectorizer = Vectorizer(graph, flow, Emitter(graph, batch))
        self.sites: dict[fx.Node, fx.Node] = {}
        self._of: dict[fx.Node, set[fx.Node]] = {}
        self._inputs: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        self._values: dict[fx.Node, object] = {}  # earlier fake values
        self._views: list[tuple[fx.Node, object]] = []

    def run(self) -> dict[fx.Node, str]:
        """Rewrite the graph; returns impossible roots -> reasons."""
        failed: dict[fx.Node, str] = {}
        for node in [node for node in self.graph.nodes if node in self.before]:
            shared = [arg for arg in node.all_input_nodes if arg in self.vectorizer.copies]
            if not shared and node not in self.roots:
                continue
            self._of[node] = {node} & self.roots
            self._of[node] = self._of[node].union(*(self._of[arg] for arg in shared))
            try:
                self._visit(node, shared)
            except Ended as ended:
                failed.update(dict.fromkeys(self._of[node], str(ended)))
        if not failed:
            try:
                self._settle()
            except Ended as ended:
                failed = dict.fromkeys(self.roots, str(ended))
        return failed

    def _visit(self, node: fx.Node, shared: list[fx.Node]) -> None:
        vectorizer = self.vectorizer
        vectorizer.before = node
        if node.op != "call_function":
            raise Ended(node, "it is returned once for all requests")
        label = vectorizer.flow.labels[node]
        if is_site(node):
            if node.target not in (SITE_OP, EMBEDDING_OP) or label is not None:
                raise Ended(node, "no rule copies what this operator computes")
            vectorizer.copies[node] = self.sites[node] = vectorizer.site(node)
        elif rule_for(node.target)[0] is unlabelled and fake_value(node) is not None:
            for arg in shared:  # for their sizes
                self._put(node, arg, vectorizer.emit(aten.select.int, vectorizer.copies[arg], 0, 0))
        elif node.target is ROWS_OF:
            y = bound(node)["y"]
            if y in vectorizer.copies:
                vectorizer.copies[node] = vectorizer.copies[y]
        elif label is not None and not _is_shared(label):
            for arg, new in vectorizer.by_owner(node):
                self._put(node, arg, new)
        else:
            joined = vectorizer.by_size(node)
            if joined is None:
                vectorizer.copies[node] = vectorizer.vectorized(node)
            elif _types(fake_value(joined)) != _types(fake_value(node)):
                raise Ended(node, OTHER_TYPE)
            else:
                for user in list(node.users):
                    self._put(user, node, joined)

    def _put(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        user.replace_input_with(old, new)
        self._inputs.append((user, old, new))

    def _settle(self) -> None:
        """Update later fake values; views that need the old strides become reshapes."""
        changed = {new for _, old, new in self._inputs if _layout(new) != _layout(old)}
        for node in self.graph.nodes:
            if node not in self.before or not changed.intersection(node.all_input_nodes):
                continue
            if node.op == "output" or called_by(node) in OF_LAYOUT:
                raise Ended(node, "its layout would change")
            old = fake_value(node)
            try:
                value = self._computed(node)
            except RuntimeError as error:
                if node.target not in VIEWS:
                    raise Ended(node, f"its layout would change: {error}") from error
                self._views.append((node, node.target))
                node.target = aten.reshape.default
                value = self._computed(node)
            if _types(value) != _types(old):
                raise Ended(node, OTHER_TYPE)
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
                        self._of[old],
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
    return isinstance(label, tuple) and all(one is None for one in label)


def _types(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_types(one) for one in value]
    return value.dtype if isinstance(value, torch.Tensor) else None


def _layout(node: fx.Node) -> object:
    return _layouts(fake_value(node))


def _layouts(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_layouts(one) for one in value]
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(str, value.shape)), tuple(map(str, value.stride()))
