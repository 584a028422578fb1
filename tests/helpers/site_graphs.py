"""Functional ATen graphs built by hand over the weights and banks of a tiny marked module.

    g = SiteGraph(Module(), rows=[0, 1, -1])
    x = g.argument(torch.randn(3, 2, K))
    y = g.call(aten.mm.default, ...)
    g.output(g.mark("up", x, y))
    gm, ctx, values = g.finish()

`values` are what `gm` is called with; every node carries its fake value, as after AOTAutograd.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

import lorafx
from lorafx.capture.driver import check_graph, stays
from lorafx.model.sites import Site
from lorafx.op_arguments import in_order
from lorafx.passes.spec import output_values
from lorafx.program.argument_roles import Role
from lorafx.program.context import EMBEDDING_OP, SITE_OP, Context
from lorafx.program.frame import Frame
from lorafx.program.inputs import FrameInput
from lorafx.program.program import BANK_FIELDS, Program

SLOTS, RANK = 3, 2


def _names(op: OpOverload) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


class Holder(nn.Module):
    """These modules, by their names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@dataclass
class Finished:
    gm: fx.GraphModule
    ctx: Context
    values: list[Any]

    def run(self, *passes: Any) -> int:
        """Run passes as the driver does; returns the edits of the last one."""
        edits, outputs = 0, output_values(self.gm)
        for item in passes:
            edits = item.run(self.gm, self.ctx)
            for node in reversed(self.gm.graph.nodes):
                if not stays(node):
                    self.gm.graph.erase_node(node)
            self.gm.recompile()
            check_graph(item.name, self.gm, self.ctx, outputs)
        return edits

    def result(self) -> Any:
        """The graph's outputs on the values, with what `match` added looked up as at run time."""
        program, extra = self.ctx.program, []
        for position, index, name in self.ctx.frame.extra_nodes:
            if name in ("slot", "slots"):
                extra.append(program.runtime.slots)
            else:
                bank = program.bank_of_weight(self.values[position], index)
                assert bank is not None
                extra.append(getattr(bank, name))
        copies = [v.clone() if isinstance(v, Tensor) else v for v in [*self.values, *extra]]
        return self.gm(*copies)

    def targets(self) -> list[str]:
        """The called ops, in order, by name without their namespace's noise."""
        return [
            str(node.target.__name__) for node in self.gm.graph.nodes if node.op == "call_function"
        ]

    def refusals(self) -> list[tuple[str, list[str], str]]:
        return [(r.when, [s.path for s in r.sites], r.reason) for r in self.ctx.refusals]


class FakeGraph:
    """Builds `graph`, whose nodes carry fake values of `mode`; `root` holds its tensors."""

    graph: fx.Graph
    root: nn.Module
    mode: FakeTensorMode

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fakes, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fakes, **named)
        return node

    def constant(self, name: str, value: Any) -> fx.Node:
        setattr(self.root, name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value)
        return node


@dataclass
class SiteGraph(FakeGraph):
    """Builder of one graph. `rows` are the slots of the requests; `own` are the modules of which
    adapters may have whole weights of their own."""

    module: nn.Module
    rows: Sequence[int]
    lowering: str = "reference"
    targets: Any = None
    dora: bool = False
    own: Sequence[str] = ()
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)

    def __post_init__(self) -> None:
        config = lorafx.LoraConfig(
            target_modules=self.targets,
            max_adapters=SLOTS,
            max_rank=RANK,
            use_dora=self.dora,
            modules_to_save=self.own,
        )
        self.compiled = lorafx.compile(
            self.module.eval().requires_grad_(False), config, options={"lowering": self.lowering}
        )
        self.program: Program = self.compiled._session.program
        self.program.runtime.set_rows(self.rows)
        torch.manual_seed(1)
        for group in self.program.groups:
            for tensor in (group.bank.A, group.bank.B):
                tensor.normal_(std=0.5)
            group.bank.ranks.random_(1, RANK + 1)
            group.bank.scales.uniform_(0.5, 2)
            if group.bank.gains is not None:
                group.bank.gains.uniform_(0.1, 0.3)
        self.mode = FakeTensorMode()
        self.values: list[Any] = []
        self.inputs: list[FrameInput] = []
        self._known: dict[int, fx.Node] = {}

    def site(self, path: str) -> Site:
        return next(site for site in self.program.sites if site.path == path)

    def input(self, value: Tensor, item: FrameInput | None = None) -> fx.Node:
        """A graph input, one for each tensor; what it is comes from the program."""
        if id(value) not in self._known:
            item = item or self.program.known_tensors()[id(value)]
            node = self.graph.placeholder(self._name(item))
            node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
            self.values.append(value)
            self.inputs.append(item)
            self._known[id(value)] = node
        return self._known[id(value)]

    def _name(self, item: FrameInput) -> str:
        """What the input is, in letters that a placeholder may have, and a number after the first
        of the kind."""
        name = re.sub(r"\W", "_", f"packed_{item.label}" if item.kind == "packed" else item.label)
        known = (re.sub(r"_\d+$", "", str(node.target)) for node in self._known.values())
        count = sum(other == name for other in known)
        return f"{name}_{count}" if count else name

    def argument(self, value: Tensor, dim: int = 0) -> fx.Node:
        return self.input(value, FrameInput("argument", "x", role=Role("x", dim)))

    def weight(self, path: str, name: str = "weight") -> fx.Node:
        return self.input(getattr(self.site(path).module, name))

    def bank(self, path: str) -> list[fx.Node]:
        group, _ = self.program.home(self.site(path))
        return [
            *(self.input(getattr(group.bank, name)) for name in BANK_FIELDS),
            self.input(self.program.runtime.slots),
        ]

    def declare(self, *paths: str, bias: bool = True, marks: bool = True) -> None:
        """Make weights, banks and slots inputs; placeholders come before all calls."""
        for path in paths:
            self.weight(path)
            if bias:
                self.weight(path, "bias")
            if marks:
                self.bank(path)
                self.packed(path)
                group, _ = self.program.home(self.site(path))
                if group.bank.gains is not None:
                    self.input(group.bank.gains)
                self.own_rows(path)

    def own_rows(self, path: str) -> dict[str, fx.Node]:
        """What a site takes of the rows that adapters have of their own."""
        group, _ = self.program.home(self.site(path))
        held = group.bank.own_rows._asdict().items()
        return {name: self.input(tensor) for name, tensor in held if tensor is not None}

    def packed(self, path: str) -> tuple[fx.Node | None, fx.Node | None]:
        group, _ = self.program.home(self.site(path))
        found = next((p for p in self.program.packed if p.group is group), None)
        if found is None:
            return None, None
        bias = None if found.bias is None else self.input(found.bias)
        return self.input(found.weight), bias

    def mark(self, path: str, x: fx.Node, y: fx.Node, rows: int = 0) -> fx.Node:
        """What the hook of the site leaves in a trace."""
        site = self.site(path)
        group, index = self.program.home(site)
        own = self.own_rows(path)
        if site.eligible.kind == "embedding":
            given = (x, y, *self.bank(path), rows)
            call = dict(zip(_names(EMBEDDING_OP), given, strict=False))
            return self.call(EMBEDDING_OP, *in_order(EMBEDDING_OP, call, **own))
        packed = self.packed(path)
        place = (*map(list, group.ranges(index)), rows)
        gains = [] if group.bank.gains is None else [self.input(group.bank.gains), None]
        given = (x, y, *self.bank(path), *place, *packed, *gains)
        if own:
            given = in_order(SITE_OP, dict(zip(_names(SITE_OP), given, strict=False)), **own)
        return self.call(SITE_OP, *given)

    def output(self, *nodes: fx.Node) -> Finished:
        self.graph.output(tuple(nodes))
        gm = fx.GraphModule(self.root, self.graph)
        frame = Frame(self.inputs)
        frame.bind(gm.graph)
        return Finished(gm, Context(self.program, frame, gm), self.values)

    def merged(self, path: str, x: Tensor) -> Tensor:
        """x (requests, ..., K) through W + ΔW of each request's slot, in fp64."""
        site = self.site(path)
        group, index = self.program.home(site)
        bank, offset = group.bank, group.offsets[index]
        weight = getattr(site.module, site.eligible.weight).double()
        bias = getattr(site.module, "bias", None)
        out = []
        for row, slot in zip(x.double(), self.rows, strict=True):
            full = weight.T if site.eligible.transposed else weight
            if slot >= 0:
                r, K = int(bank.ranks[slot, index]), site.in_features
                a = bank.A[slot, :r, index * K : (index + 1) * K].double()
                b = bank.B[slot, :r, offset : offset + site.out_features].double()
                full = full + float(bank.scales[slot, index]) * (a.T @ b).T
            y = row @ full.T
            out.append(y if bias is None else y + bias.double())
        return torch.stack(out).float()
