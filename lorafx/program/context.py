"""What graph passes read and change: the frame, the site nodes, refusals, and new nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import lorafx.kernels.ops.conv_ops
import lorafx.kernels.ops.grouped_ops
import lorafx.kernels.ops.linear_ops
import lorafx.kernels.ops.row_ops  # noqa: F401  (all define torch.ops.lorafx)
from lorafx.errors import MatchError
from lorafx.model.sites import Site
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound
from lorafx.ownership.flow import place, plain_path
from lorafx.program.frame import LOOKED_UP, ONE_SLOT, SLOTS, Frame, fake_value
from lorafx.program.inputs import FrameInput, InputKind
from lorafx.program.program import BANK_FIELDS, GAINS, SHIFTS, Program
from lorafx.program.refusals import Refusal
from lorafx.program.row_handoff import Handover
from lorafx.program.weight_uses import Use
from lorafx.registry import lookup
from lorafx.torch_internals.graph_parts import (
    FakeTensorMode,
    OpOverload,
    detect_fake_mode,
    enable_python_dispatcher,
    make_fx,
)

aten = torch.ops.aten

SITE_OP = torch.ops.lorafx.site.default
EMBEDDING_OP = torch.ops.lorafx.embedding_site.default
GROUPED_OP = torch.ops.lorafx.grouped_site.default
CONV_OP = torch.ops.lorafx.conv_site.default
EXPERT_OP = torch.ops.lorafx.expert_site.default
EXPERT_MARK = torch.ops.lorafx.expert_mark.default
ROWS_OF = torch.ops.lorafx.rows_of.default
OWN_MASK = torch.ops.lorafx.own_mask.default
FUSED_OP = torch.ops.lorafx.fused_linear.default

#: Casts, as Inductor's decompositions leave them in graphs.
_CASTS = {
    aten._to_copy.default: lambda x, dtype, **_: torch.ops.prims.convert_element_type(x, dtype)
}

SITE_OPS = frozenset({SITE_OP, EMBEDDING_OP, GROUPED_OP, CONV_OP, EXPERT_OP})
#: Ops without generated kernels, unchanged by every lowering.
PLAIN_SITE_OPS = frozenset({GROUPED_OP, CONV_OP})
#: Origins of a node, for messages and dumps.
COPIED = ("nn_module_stack", "stack_trace")


def is_site(node: fx.Node) -> bool:
    """Whether the op of a node adds a site's delta to y."""
    return node.op == "call_function" and node.target in SITE_OPS


@dataclass
class SiteState:
    """How a graph serves a site, for `explain` and dumps."""

    site: Site
    use: Use | None
    rows: str = "unproved"
    form: str = "mark"
    strategy: str = ""
    node_key: int = 0  # sites with the same key are served by one node
    packed_weight: fx.Node | None = None
    packed_bias: fx.Node | None = None


@dataclass(frozen=True)
class Outlined:
    """Layers that call one body: its attribute's name, their module paths, and its size."""

    name: str
    paths: tuple[str, ...]
    nodes: int

    def __str__(self) -> str:
        repeats = len(self.paths) - 1
        return f"{self.paths[0] or '(root)'} and {repeats} more like it as one, {self.nodes} nodes"


@dataclass(eq=False)
class Context:
    """The state of a graph between passes."""

    program: Program
    frame: Frame
    graph_module: fx.GraphModule
    states: dict[fx.Node, list[SiteState]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    #: Ids of the generated Triton kernels that the graph calls.
    kernels: set[int] = field(default_factory=set)
    handover: Handover = field(default_factory=Handover)
    outlined: list[Outlined] = field(default_factory=list)
    #: Sites with a shared x, and why `give_out` did not copy it for each request.
    kept_shared: dict[fx.Node, str] = field(default_factory=dict)
    #: Sums of weighed deltas, which `gate` made -> the sites.
    gated: dict[fx.Node, list[SiteState]] = field(default_factory=dict)
    #: Site nodes moved by `outline` -> the call that computes each, and the node in its body.
    homes: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    #: The bases of the results that AOTAutograd knew, when Inductor rewrites the graph.
    memory: Sequence[Any] = ()
    #: Names of the passes so far.
    passed: list[str] = field(default_factory=list)
    fake_mode: FakeTensorMode | None = field(init=False)

    def __post_init__(self) -> None:
        # Of AOTAutograd's values: those of Dynamo are of another mode than the backend's.
        values = [node.meta.get("val") for node in self.graph.nodes]
        self.fake_mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    # --- site nodes ---

    def site_of_mark(self, node: fx.Node) -> Site:
        """The site of a mark's op, found by its bank and its first sibling."""
        call = bound(node)
        item = self.frame.by_node.get(call["A"])
        if item is None or item.group is None:
            raise MatchError(
                f"{node.name} takes a bank that is not an input of this model's "
                f"graph ({place(node)}); another model's mark may have been captured with "
                "it"
            )
        return item.group.site_of(int(call.get("siblings", (0,))[0]))

    def record(self, site: Site, node: fx.Node, use: Use | None, *, form: str = "mark") -> None:
        self.states[node] = [SiteState(site, use, form=form)]

    def merge(self, old: Iterable[fx.Node], new: fx.Node, form: str) -> None:
        merged: list[SiteState] = []
        for node in old:
            merged.extend(self.states.pop(node))
        for state in merged:
            state.form = form
        self.states[new] = merged

    def refuse(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)

    # --- locations ---

    def inside(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether the forward of `module`, or of a module below it, made `node`."""
        stack = node.meta.get("nn_module_stack") or {}
        names = [str(key).partition("@")[0] for key in stack]
        if any(name.isdecimal() for name in names):  # Dynamo's keys are identities
            return str(id(module)) in names
        # Paths are the module's only if the whole model is one frame.
        paths = self.program.graph.paths(module)
        return any(plain_path(path) in paths for path, _ in stack.values())

    def unknown_use(self, weight: fx.Node, node: fx.Node, reason: str) -> Refusal:
        """The refusal of an unknown use by `node` of a weight of sites."""
        return Refusal(
            self.frame.by_node[weight].sites,
            "always",
            f"its weight is used in a way that no rule covers: {reason} ({place(node)})",
        )

    def other_holders(self, weight: fx.Node) -> list[nn.Module]:
        sites = self.frame.by_node[weight].sites
        tensor = self.program.weight_of(sites[0])
        if tensor is None:
            return []
        selected = {id(site.module) for site in sites}
        holders = self.program.graph.holders(tensor)
        return [item.module for item in holders if id(item.module) not in selected]

    def made_by_other_holder(self, node: fx.Node, weight: fx.Node) -> bool:
        """Whether the forward of a module that has this weight, but is no site and contains none,
        made `node`."""
        item = self.frame.by_node[weight]
        if item.derived is not None or any(self.inside(node, s.module) for s in item.sites):
            return False
        ancestors = self.program.graph.ancestors(site.module for site in item.sites)
        return any(
            id(module) not in ancestors and self.inside(node, module)
            for module in self.other_holders(weight)
        )

    def unselected_holders(self, weight: fx.Node, kind: str) -> list[nn.Module]:
        return [
            module
            for module in self.other_holders(weight)
            if (entry := lookup(module)) is not None and entry.kind == kind
        ]

    # --- new nodes ---

    def call(self, graph: fx.Graph, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """A call_function node with a fake value at the insertion point; `kwargs` have no nodes."""
        node = graph.call_function(target, args, kwargs)
        values = fx.node.map_arg(args, fake_value)
        assert self.fake_mode is not None
        with self.fake_mode:
            node.meta["val"] = target(*values, **kwargs)
        return node

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.call(self.graph, target, args, **kwargs)

    def traced(self, function: Callable[..., Any], *operands: fx.Node) -> Any:
        """The result of `function` of these nodes: its operators become nodes of the graph."""
        values = [fake_value(node) for node in operands]
        with enable_python_dispatcher(), self.fake_mode or nullcontext():
            traced = make_fx(function, decomposition_table=_CASTS)(*values).graph
        inputs = (node for node in traced.nodes if node.op == "placeholder")
        return self.graph.graph_copy(traced, dict(zip(inputs, operands, strict=True)))

    def size(self, node: fx.Node, dim: int) -> Any:
        size = fake_value(node).shape[dim]
        return size if isinstance(size, int) else self.emit(torch.ops.aten.sym_size.int, node, dim)

    def numbers(self, count: Any, dtype: torch.dtype, device: torch.device) -> fx.Node:
        """0, 1, … count - 1, as Inductor decomposes `arange`."""
        settings = {"dtype": dtype, "device": device, "requires_grad": False}
        return self.emit(torch.ops.prims.iota.default, count, start=0, step=1, **settings)

    def row_slots(self, slots: fx.Node, rows: Any, count: Any) -> fx.Node:
        """`lorafx.kernels.ops.delta.row_slots` in aten, for proved rows."""
        return self.emit(aten.index.Tensor, slots, [self.row_owners(slots, rows, count)])

    def row_owners(self, slots: fx.Node, rows: Any, count: Any) -> fx.Node:
        """(m // rows) mod n for `count` rows m, int64; n is the last size of `slots`."""
        value = fake_value(slots)
        index = self.numbers(count, torch.int64, value.device)
        index = self.emit(aten.div.Scalar_mode, index, rows, rounding_mode="floor")
        return self.emit(aten.remainder.Scalar, index, self.size(slots, value.dim() - 1))

    def row_count(self, node: fx.Node, dims: int) -> Any:
        """The number of rows in the first `dims` dimensions of a node."""
        count: Any = 1
        for dim in range(dims):
            size = self.size(node, dim)
            known = isinstance(count, int) and isinstance(size, int)
            count = count * size if known else self.emit(operator.mul, count, size)
        return count

    def bank_inputs(self, site: Site, weight: fx.Node) -> dict[str, fx.Node | None]:
        """The site's bank fields and slots as inputs, which executables look up by the weight: a
        graph may serve several layers. Gains and shifts are None if the bank has no room."""
        bank = self.program.site_bank(site)
        row_fields = bank.own_rows._fields
        fields: dict[str, fx.Node | None] = dict.fromkeys((GAINS, SHIFTS))
        for name in (*BANK_FIELDS, *row_fields, GAINS, SHIFTS):
            if getattr(bank, name) is not None:
                fields[name] = self.bank_input(site, weight, name)
        items = self.frame.by_node.items()
        slots = next((node for node, item in items if item.kind == "slots"), None)
        return {**fields, "slots": slots or self.slots_input(self._weight_key(site, weight))}

    def bank_input(self, site: Site, weight: fx.Node, name: str) -> fx.Node:
        assert self.fake_mode is not None
        value = getattr(self.program.site_bank(site), name)
        fake = self.fake_mode.from_tensor(value, static_shapes=True)
        return self._extra_input(self._weight_key(site, weight), name, fake)

    def field_of_same_bank(self, field: fx.Node, name: str) -> fx.Node | None:
        """The input of the field `name` of the bank that has `field`, if any."""
        inputs = self.frame.extra_nodes
        key = next((key for key, node in inputs.items() if node is field), None)
        return None if key is None else inputs.get((*key[:2], name))

    def _weight_key(self, site: Site, weight: fx.Node) -> tuple[int, int]:
        # Tied weights have several sites: a head and an embedding.
        return self.frame.positions[weight], self.frame.by_node[weight].sites.index(site)

    def slots_input(self, weight_key: tuple[int, int]) -> fx.Node:
        assert self.fake_mode is not None
        size = self.frame.slot_count()
        with self.fake_mode:
            value = torch.empty(
                (1 if size is None else size,),
                dtype=torch.int32,
                device=self.program.groups[0].bank.A.device,
            )
        return self._extra_input(weight_key, ONE_SLOT if size is None else SLOTS, value)

    def gates_input(self, name: str, slots: fx.Node) -> fx.Node:
        """A field of `Gates` as an input; `slots` (n,) are the frame's."""
        assert self.fake_mode is not None
        like, many = fake_value(slots), name in ("slots", "weights")
        dtype = torch.float32 if name in ("weights", "temperatures") else torch.int32
        form = self.frame.slots
        layers = (len(form.layers),) if form.layers and name == "weights" else ()
        shape = (*layers, form.gates, *like.shape) if many else like.shape
        with self.fake_mode:
            value = torch.empty(shape, dtype=dtype, device=like.device)
        return self._extra_input((0, 0), f"gate_{name}", value)

    def _extra_input(self, weight_key: tuple[int, int], name: str, value: Tensor) -> fx.Node:
        key = (*weight_key, name)
        if key in self.frame.extra_nodes:
            return self.frame.extra_nodes[key]
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"lorafx_{name}_{len(self.frame.extra_nodes)}")
        node.meta["val"] = value
        self.frame.extra_nodes[key] = node
        kind: InputKind = "slots" if name in LOOKED_UP else "bank"
        self.frame.by_node[node] = FrameInput(kind, name)
        return node


def call_in_place(op: OpOverload, arguments: tuple[Any, ...]) -> fx.Node:
    """y, the first argument, written by `op`, in functional form: Inductor decides on copies."""
    return written_by(op, dict(zip(_names(op), arguments, strict=True)), _names(op)[0])[0]


def written_by(op: OpOverload, values: Mapping[str, Any], *written: str) -> list[fx.Node]:
    """The values, after a call of `op`, of `written`, all arguments that it writes."""
    arguments = {name: values[name] for name in _names(op)}
    graph = arguments[written[0]].graph
    call = graph.call_function(AUTO_FUNCTIONALIZED, (op,), arguments)
    call.meta["val"] = (None, *(fake_value(arguments[name]) for name in written))
    results: list[fx.Node] = []
    with graph.inserting_after(call):
        for index in range(len(written), 0, -1):
            results.insert(0, graph.call_function(operator.getitem, (call, index)))
            results[0].meta["val"] = call.meta["val"][index]
    return results


def _names(op: OpOverload) -> list[str]:
    return [argument.name for argument in op._schema.arguments]
