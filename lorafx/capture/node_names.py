"""Readable names of a graph's nodes, for texts alone.

    mm_3              →  layers_0_down_proj_mm            the operation, and the module
    fused_linear_7    →  layers_0_q_proj_k_proj_packed    the sites that it serves
    l_stack0_arg_12   →  layers_0_q_proj_weight           the meaning of an input

The graph keeps its names. A node has the same name in all stages; names of removed nodes are
reused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from lorafx.capture.graph_text import value_of
from lorafx.capture.recorder import Place, Stage
from lorafx.errors import ProvenanceError
from lorafx.op_arguments import AUTO_FUNCTIONALIZED
from lorafx.passes.outline.outline import INVOKE
from lorafx.program.context import SITE_OPS, module_path, plain_path
from lorafx.program.frame import Frame, FrameInput, batch_symbols
from lorafx.torch_internals.operators import HigherOrderOperator, OpOverload

#: Sites spelt out in a name.
_SPELT = 4


class Size(NamedTuple):
    """The meaning of a symbol: a dimension of an input, and what it counts if known."""

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


def sizes_of(frame: Frame, inputs: Mapping[fx.Node, FrameInput]) -> dict[str, Size]:
    """The meanings of the symbols in input sizes; arguments of the call take precedence."""
    found: dict[str, Size] = {}
    try:
        requests = {str(symbol) for symbol in batch_symbols(frame)} if frame.by_node else set()
    except ProvenanceError:
        requests = set()
    for node, item in sorted(inputs.items(), key=lambda pair: pair[1].kind != "argument"):
        value = value_of(node)
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


def names_of(stages: Iterable[Stage], sizes: Mapping[str, Size]) -> dict[Place, str]:
    """The names of all nodes of all stages of a graph."""
    naming = _Naming(sizes)
    for stage in stages:
        naming.add(stage)
    return naming.names


class _Facts(NamedTuple):
    what: str
    paths: tuple[str, ...] = ()
    item_of: Place | None = None


class _Naming:
    def __init__(self, sizes: Mapping[str, Size]) -> None:
        self.names: dict[Place, str] = {}
        self._sizes = sizes
        self._facts: dict[Place, _Facts] = {}
        self._short = ShortPaths()

    def add(self, stage: Stage) -> None:
        calls: dict[Any, fx.Node] = {}
        for node in stage.graphs[""].find_nodes(op="call_function", target=INVOKE):
            calls.setdefault(node.args[1], node)
        new: list[Place] = []
        used: set[Place] = set()
        for path, graph in stage.graphs.items():
            given = iter(calls[path].args[2:]) if path in calls else iter(())
            for node in graph.nodes:
                place = path, node.name
                operand = next(given, None) if node.op == "placeholder" else None
                if place in self.names:
                    used.add((path, self.names[place]))
                elif node.op != "output":
                    new.append(place)
                    if isinstance(operand, fx.Node):  # a body's input is named after its operand
                        self._facts[place] = self._facts["", operand.name]
                    else:
                        self._facts[place] = self._of(stage, place, node)
        self._short.add(path for place in new for path in self._facts[place].paths)
        for place in new:
            base = name = self._base(place)
            others = 0
            while (place[0], name) in used:
                name = f"{base}_{others + 1}"
                others += 1
            used.add((place[0], name))
            self.names[place] = name

    def _of(self, stage: Stage, place: Place, node: fx.Node) -> _Facts:
        item = stage.inputs.get(node.name) if not place[0] and node.op == "placeholder" else None
        if item is not None:
            return _Facts(*self._input(node, item))
        states = stage.sites.get(place)
        if states and node.target is not INVOKE:
            # Forms less specific than "lora".
            plain = states[0].form in ("mark", "rewritten")
            what = "lora" if plain else states[0].form
            return _Facts(what, tuple(state.site.path for state in states))
        what, path = _operator(node), module_path(node)
        if what == "getitem" and isinstance(node.args[0], fx.Node):
            part = _part_of_pack(stage, place[0], node)
            if part is not None:
                return _Facts("out", (part,))
            return _Facts(str(node.args[1]), (), (place[0], node.args[0].name))
        what = "lora" if node.target in SITE_OPS else what
        return _Facts(what, (path,) if path else ())

    def _input(self, node: fx.Node, item: FrameInput) -> tuple[str, tuple[str, ...]]:
        value, part = value_of(node), f"_{item.part}" if item.part else ""
        sites = item.group.sites if item.group is not None else item.sites
        paths = tuple(site.path for site in sites)
        if item.kind in ("bank", "packed"):
            return f"{item.kind}_{item.label}", paths
        if item.kind == "slots":
            return item.label, ()
        if item.kind == "symbol":
            size = self._sizes.get(str(value)) if isinstance(value, torch.SymInt) else None
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

    def _base(self, place: Place) -> str:
        what, paths, item_of = self._facts[place]
        if item_of is not None:
            return f"{self.names.get(item_of) or self._base(item_of)}_{what}"
        others = [path.rpartition(".")[2] for path in paths[1:]]
        if len(paths) > _SPELT:
            others = [f"and_{len(paths) - 1}_more"]
        parts = [*map(self._short.of, paths[:1]), *others, what]
        return _identifier("_".join(filter(None, parts)))


def _part_of_pack(stage: Stage, path: str, item: fx.Node) -> str | None:
    split, index = item.args
    if not isinstance(split, fx.Node) or _operator(split) != "split_with_sizes":
        return None
    packed = split.args[0]
    states = stage.sites.get((path, packed.name), ()) if isinstance(packed, fx.Node) else ()
    if len(states) > 1 and isinstance(index, int) and index < len(states):
        return states[index].site.path
    return None


class ShortPaths:
    """Unique short names of modules: `model.layers.0.self_attn.q_proj` → `layers_0_q_proj`."""

    def __init__(self) -> None:
        self._short: dict[str, str] = {}

    def of(self, path: str) -> str:
        return self._short[path]

    def add(self, paths: Iterable[str]) -> None:
        left = [path for path in dict.fromkeys(paths) if path not in self._short]
        taken, kept = set(self._short.values()), 1
        while left:
            alike: dict[str, list[str]] = {}
            for path in left:
                alike.setdefault(_shortened(path, kept), []).append(path)
            left = []
            for name, found in alike.items():
                whole = kept > max(path.count(".") + 1 for path in found)
                if whole or (len(found) == 1 and name not in taken):
                    self._short.update(dict.fromkeys(found, name))
                else:
                    left += found
            kept += 1


def _shortened(path: str, kept: int) -> str:
    """The numbered parts of a path and `kept` others, preferably from the end."""
    parts = path.split(".")
    numbers = {i for i, part in enumerate(parts) if part.isdecimal()}
    numbers |= {i - 1 for i in numbers if i}
    end = max(numbers, default=-1)
    rest = [i for i in range(len(parts)) if i not in numbers]
    order = sorted(rest, key=lambda i: (i < end, -i))
    chosen = numbers | set(order[:kept])
    return "_".join(part for i, part in enumerate(parts) if i in chosen)


def _identifier(text: str) -> str:
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    return f"module_{name}" if name[0].isdecimal() else name


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    if target is AUTO_FUNCTIONALIZED:
        target = node.args[0]
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2].strip("_")
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return target if isinstance(target, str) else getattr(target, "__name__", node.name)


def _label(item: FrameInput) -> str:
    """Dynamo's source of an input as an identifier."""
    return plain_path(item.label) or re.sub(r"\W+", "_", item.label.removeprefix("L")).strip("_")
