"""Readable names of a graph's nodes, for dumps alone.

    mm_3              →  layers_0_down_proj_mm            what it does, where the model does it
    fused_linear_7    →  layers_0_q_proj_k_proj_packed    the sites that it serves
    l_stack0_arg_12   →  layers_0_q_proj_weight           what an input is

The graph keeps its own names. While it is captured, facts are noted: a record a node, without the
node. Names are made of them where a dump is read, in the order of the stages, so a node is called
the same in all of them; a name is free again when the node that had it is gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from lorafx.errors import ProvenanceError
from lorafx.graph.context import SITE_OPS, Context, module_path, plain_path
from lorafx.op_arguments import AUTO_FUNCTIONALIZED
from lorafx.passes.outline.outline import INVOKE
from lorafx.passes.outline.regions import bodies
from lorafx.program.frame import Frame, FrameInput, batch_symbols
from lorafx.torch_internals.operators import HigherOrderOperator, OpOverload

#: Stands in a printed line for the name of the node with this number.
_MARK = re.compile("\x01([0-9]+)\x01")
#: Forms of a site's node that say less than "lora" does.
_PLAIN_FORMS = ("mark", "rewritten")
#: Sites that a name spells out.
_SPELT = 4


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is known of one node.

    Attributes:
        raw: its name in the graph.
        what: the operator, or what an input is; the index of an item of another node.
        paths: of the sites that it serves or belongs to, else of the module whose forward made it.
        item_of: the number of the node that it is an item of.
        body: of inputs of an outlined body, that body: they are called as what it is given.
    """

    raw: str
    what: str
    paths: tuple[str, ...] = ()
    item_of: int | None = None
    body: str = ""


class Size(NamedTuple):
    """What a symbol in shapes is: a dimension of an input, and what it counts if that is known."""

    of: str
    dim: int
    counts: Literal["requests", "tokens", ""] = ""

    @property
    def name(self) -> str:
        return self.counts or f"{self.of}_size_{self.dim}"

    @property
    def words(self) -> str:
        counted = {"requests": "requests of the batch: ", "tokens": "tokens of each request: "}
        return f"{counted.get(self.counts, '')}dimension {self.dim} of {self.of}"

    def __str__(self) -> str:
        return f"{self.of}.shape[{self.dim}]"


@dataclass
class NodeNames:
    """The nodes of one graph by number, as they are first seen.

    Attributes:
        facts: by number.
        symbols: what the symbols in shapes are.
    """

    facts: list[NodeFacts] = field(default_factory=list)
    symbols: dict[str, Size] = field(default_factory=dict)
    _numbers: dict[fx.Node, int] = field(default_factory=dict)

    def mark(self, node: fx.Node) -> str:
        """What stands for the node's name in a printed line."""
        return f"\x01{self.number(node)}\x01"

    def number(self, node: fx.Node) -> int:
        """The same in every stage."""
        found = self._numbers.get(node)
        if found is None:
            self._note(node, self._facts(node))
            found = self._numbers[node]
        return found

    def forget_nodes(self) -> None:
        """Hold no node alive. For when the last stage is printed."""
        self._numbers.clear()

    def note_inputs(self, frame: Frame, inputs: Mapping[fx.Node, FrameInput]) -> None:
        """Note what the graph's inputs are, those that are not noted yet."""
        new = {node: item for node, item in inputs.items() if node not in self._numbers}
        if new:
            self.symbols = {**_symbols(frame, new), **self.symbols}
        for node, item in new.items():
            self._note(node, NodeFacts(node.name, *self._input(frame, node, item)))

    def note_pass(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Note what a pass has made: inputs, nodes that serve sites, and their parts of packs."""
        self.note_inputs(ctx.frame, ctx.frame.by_node)
        for node, states in ctx.states.items():
            node = ctx.homes[node][1] if node in ctx.homes else node
            paths = tuple(state.site.path for state in states)
            if node not in self._numbers:
                form = states[0].form
                what = "lora" if form in _PLAIN_FORMS else form
                self._note(node, NodeFacts(node.name, what, paths))
            if len(paths) > 1:
                self._note_parts(node, paths)
        if ctx.outlined:
            self._note_bodies(gm)

    def _note(self, node: fx.Node, facts: NodeFacts) -> None:
        self._numbers[node] = len(self.facts)
        self.facts.append(facts)

    def _note_parts(self, packed: fx.Node, paths: Sequence[str]) -> None:
        splits = (user for user in packed.users if _operator(user) == "split_with_sizes")
        for item in (user for split in splits for user in split.users):
            index = item.args[1] if _operator(item) == "getitem" else None
            if item not in self._numbers and isinstance(index, int) and index < len(paths):
                self._note(item, NodeFacts(item.name, "out", (paths[index],)))

    def _note_bodies(self, gm: fx.GraphModule) -> None:
        """A body's inputs are called as what its first call is given."""
        calls: dict[Any, fx.Node] = {}
        for node in gm.graph.find_nodes(op="call_function", target=INVOKE):
            calls.setdefault(node.args[1], node)
        for name, body in bodies(gm):
            inputs = body.graph.find_nodes(op="placeholder")
            given: Sequence[Any] = calls[name].args[2:] if name in calls else ()
            for node, operand in zip(inputs, given, strict=False):
                if node not in self._numbers and isinstance(operand, fx.Node):
                    outer = self.facts[self.number(operand)]
                    self._note(node, replace(outer, raw=node.name, body=name))

    def _facts(self, node: fx.Node) -> NodeFacts:
        what, path = _operator(node), module_path(node)
        if what == "getitem" and isinstance(node.args[0], fx.Node):
            return NodeFacts(node.name, str(node.args[1]), (), self.number(node.args[0]))
        what = "lora" if node.target in SITE_OPS else what
        return NodeFacts(node.name, what, (path,) if path else ())

    def _input(self, frame: Frame, node: fx.Node, item: FrameInput) -> tuple[str, tuple[str, ...]]:
        value, part = _value(node), f"_{item.part}" if item.part else ""
        sites = item.group.sites if item.group is not None else item.sites
        paths = tuple(site.path for site in sites)
        if item.kind == "bank":
            if not paths:  # looked up by a weight
                paths = _of_weight(frame, node)
            return f"bank_{item.label}", paths
        if item.kind == "packed":
            return f"packed_{item.label}", paths
        if item.kind == "slots":
            return item.label, ()
        if item.kind == "symbol":
            size = self.symbols.get(str(value)) if isinstance(value, torch.SymInt) else None
            return (_label(item) if size is None else size.name) + part, ()
        if item.kind == "weight":
            name = item.label.rpartition(".")[2]
            name = item.sites[0].eligible.weight if item.derived is None else f"from_{name}"
            return name + part, paths[:1]
        if item.holder is not None:
            return item.holder.attribute + part, (item.holder.path,) if item.holder.path else ()
        if item.role is not None and item.kind == "argument":
            return item.role.argument + part, ()
        if item.kind == "result":
            return "from_an_earlier_graph" + part, ()
        return _label(item), ()


class Renamer:
    """The names of one graph's nodes, stage by stage."""

    def __init__(self, facts: Sequence[NodeFacts]) -> None:
        self._facts = facts
        self._short = ShortPaths()
        self.names: dict[int, str] = {}

    def stage(self, lines: Iterable[str]) -> list[str]:
        """The lines of the next stage with names in place of numbers."""
        lines = list(lines)
        seen = dict.fromkeys(int(number) for line in lines for number in _MARK.findall(line))
        # Graph inputs come first: they keep the plain names.
        new = sorted(number for number in seen if number not in self.names)
        self._short.add(path for number in new for path in self._facts[number].paths)
        facts = self._facts
        used = {(facts[n].body, self.names[n]) for n in seen if n in self.names}
        for number in new:
            base, name, others = self._base(number), "", 0
            while not name or (facts[number].body, name) in used:
                name = f"{base}_{others}" if others else base
                others += 1
            used.add((facts[number].body, name))
            self.names[number] = name
        return list(map(self.named, lines))

    def named(self, text: str) -> str:
        """`text`, of a stage that was here, with names in place of numbers."""
        return _MARK.sub(lambda found: self.names[int(found[1])], text)

    def _base(self, number: int) -> str:
        facts = self._facts[number]
        if facts.item_of is not None:
            whole = self.names.get(facts.item_of) or self._base(facts.item_of)
            return f"{whole}_{facts.what}"
        return _identifier("_".join(filter(None, (self._place(facts.paths), facts.what))))

    def _place(self, paths: Sequence[str]) -> str:
        if not paths:
            return ""
        others = [path.rpartition(".")[2] for path in paths[1:]]
        if len(paths) > _SPELT:
            others = [f"and_{len(paths) - 1}_more"]
        return "_".join([self._short.of(paths[0]), *others])


class ShortPaths:
    """Paths of modules as short names: layers with their numbers, and as much more of the end as
    tells them apart (`model.layers.0.self_attn.q_proj` → `layers_0_q_proj`)."""

    def __init__(self) -> None:
        self._short: dict[str, str] = {}

    def of(self, path: str) -> str:
        """The short name of a path that was added."""
        return self._short[path]

    def add(self, paths: Iterable[str]) -> None:
        """Find short names for paths; those that have one keep it."""
        left = [path for path in dict.fromkeys(paths) if path not in self._short]
        taken, kept = set(self._short.values()), 1
        while left:
            alike: dict[str, list[str]] = {}
            for path in left:
                alike.setdefault(_shortened(path, kept), []).append(path)
            left = []
            for name, found in alike.items():
                if (len(found) == 1 and name not in taken) or kept > max(
                    path.count(".") + 1 for path in found
                ):
                    self._short.update(dict.fromkeys(found, name))
                else:
                    left += found
            kept += 1


def _shortened(path: str, kept: int) -> str:
    parts = path.split(".")
    numbers = {i for i, part in enumerate(parts) if part.isdecimal()}
    numbers |= {i - 1 for i in numbers if i}
    end = max(numbers, default=-1)
    rest = [i for i in range(len(parts)) if i not in numbers]
    # The end of the path says most, then what is before the last number.
    order = sorted(rest, key=lambda i: (i < end, -i))
    chosen = numbers | set(order[:kept])
    return "_".join(part for i, part in enumerate(parts) if i in chosen)


def _identifier(text: str) -> str:
    """`text` as a name of Python's."""
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    return f"module_{name}" if name[0].isdecimal() else name


def _operator(node: fx.Node) -> str:
    """The short name of what the node calls."""
    target: Any = node.target
    if target is AUTO_FUNCTIONALIZED:
        target = node.args[0]
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2].strip("_")
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return target if isinstance(target, str) else getattr(target, "__name__", node.name)


def _label(item: FrameInput) -> str:
    """Where Dynamo found an input, in words that a name may have."""
    return plain_path(item.label) or re.sub(r"\W+", "_", item.label.removeprefix("L")).strip("_")


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _of_weight(frame: Frame, node: fx.Node) -> tuple[str, ...]:
    """The path of the site whose bank an input holds that is looked up by the site's weight."""
    place = next((key for key, extra in frame.extra_nodes.items() if extra is node), None)
    if place is None:
        return ()
    sites = frame.inputs[place[0]].sites
    return (sites[place[1]].path,) if place[1] < len(sites) else ()


def _symbols(frame: Frame, inputs: Mapping[fx.Node, FrameInput]) -> dict[str, Size]:
    """What the symbols are that sizes of inputs have; arguments of the call say it best."""
    found: dict[str, Size] = {}
    try:
        requests = {str(symbol) for symbol in batch_symbols(frame)} if frame.by_node else set()
    except ProvenanceError:
        requests = set()
    order = sorted(inputs.items(), key=lambda each: each[1].kind != "argument")
    for node, item in order:
        value = _value(node)
        if not isinstance(value, Tensor):
            continue
        label = item.role.argument if item.role is not None else _label(item)
        for dim, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or not size.node.expr.is_Symbol or symbol in found:
                continue
            if symbol in requests or item.requests_dim == dim:
                found[symbol] = Size(label, dim, "requests")
            elif item.kind == "argument" and frame.token_dims.get(label) == dim:
                found[symbol] = Size(label, dim, "tokens")
            else:
                found[symbol] = Size(label, dim)
    return found
