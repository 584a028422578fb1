"""Graphs as readable programs, with the user's lines of code.

    # model.layers.0.mlp.up_proj (my_model.py:71): up = self.up_proj(x)
    layers_0_up_proj_mm: "float32[8, 352]" = torch.ops.aten.mm.default(view, permute)

A node is named after its site or module and its operator, an input after what it contains. Only
this text uses the names; those of the graph's nodes stay.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import magic_methods

from lorafx.capture.record import Place, Size, Stage, identifier
from lorafx.op_arguments import AUTO_FUNCTIONALIZED
from lorafx.ownership.flow import module_path
from lorafx.program.bodies import INVOKE
from lorafx.program.context import SITE_OPS
from lorafx.program.frame import fake_value
from lorafx.program.inputs import FrameInput
from lorafx.torch_internals.graph_parts import HigherOrderOperator, OpOverload, OpOverloadPacket

_INDENT = "    "
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: Sites that a name spells out; where a node has more, the others are counted.
_MOST_SITES = 4


class Printer:
    """Prints the nodes of a stage's graph at `path` ("": the main graph) with these `names`."""

    def __init__(self, path: str, names: Mapping[Place, str]) -> None:
        self._path = path
        self._names = names

    def name(self, node: fx.Node) -> str:
        return self._names.get((self._path, node.name), node.name)

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self.text(node.args[0])}"
        value = value_text(node)
        annotated = f'{self.name(node)}: "{value}"' if value else self.name(node)
        return annotated if node.op == "placeholder" else f"{annotated} = {self._call(node)}"

    def _call(self, node: fx.Node) -> str:
        target: Any = node.target
        if node.op == "get_attr":
            return f"self.{target}"
        positional = list(map(self.text, node.args))
        keywords = [f"{key} = {self.text(item)}" for key, item in node.kwargs.items()]
        if target is operator.getitem:
            return "{}[{}]".format(*positional)
        infix = magic_methods.get(getattr(target, "__name__", ""))
        if infix and getattr(target, "__module__", "") == "_operator":
            return infix.format(*positional)
        if node.op == "call_method":
            function = f"{positional.pop(0)}.{target}"
        else:
            function = f"self.{target}" if node.op == "call_module" else self.text(target)
        return f"{function}({', '.join([*positional, *keywords])})"

    def text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.name(value)
        if value is None or isinstance(value, (int, float, str)):
            return repr(value)
        if isinstance(value, (OpOverload, OpOverloadPacket)):
            return f"torch.ops.{value}"
        if isinstance(value, HigherOrderOperator):
            return f"torch.ops.higher_order.{value.name()}"
        if isinstance(value, tuple):
            return f"({', '.join(map(self.text, value))}{',' * (len(value) == 1)})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.text, value))}]"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.text, (value.start, value.stop, value.step)))})"
        if isinstance(value, Mapping):
            items = (f"{key!r}: {self.text(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, Tensor):
            return f"torch.Tensor(size={[*value.shape]}, dtype={value.dtype})"
        if isinstance(value, _SYMBOLIC):
            return str(value.node.expr)
        return _function_name(value) if callable(value) else repr(value)


def _function_name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None:
        return repr(function)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else str(name)


def value_text(node: fx.Node) -> str:
    """A tensor's dtype and shape, a symbolic number's expression, or "" for other values."""
    value = fake_value(node)
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return f"Sym({value.node.expr})" if isinstance(value, _SYMBOLIC) else ""


def path_of(stage: Stage, place: Place, node: fx.Node) -> str:
    """The path of the module whose forward made a node, or of the site that a pass made it for."""
    sites = stage.sites.get(place)
    return module_path(node) or (sites[0].site.path if sites else "")


def stage_lines(stage: Stage, names: Mapping[Place, str]) -> list[str]:
    """The lines of the stage as a program, followed by those of the bodies that it calls."""
    lines: list[str] = []
    for path, graph in stage.graphs.items():
        printer = Printer(path, names)
        arguments = ["self", *map(printer.line, graph.find_nodes(op="placeholder"))]
        program = [
            f"class {path.rpartition('.')[2] or 'GraphModule'}(torch.nn.Module):",
            f"{_INDENT}def forward(",
            *(f"{_INDENT * 2}{argument}," for argument in arguments),
            f"{_INDENT}):",
        ]
        last = ""
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            comment = _origin_comment(stage, (path, node.name), node)
            if comment and comment != last:
                program.append(f"{_INDENT * 2}# {comment}")
            last = comment
            program.append(_INDENT * 2 + printer.line(node))
        indent = _INDENT * (path.count(".") + 1) if path else ""
        lines += ["", *(indent + line for line in program)] if path else program
    return lines


def _origin_comment(stage: Stage, place: Place, node: fx.Node) -> str:
    source = node.meta.get("stack_trace")
    path = path_of(stage, place, node)
    if not isinstance(source, str):
        return "" if module_path(node) else path
    line, code = users_line(source)
    return ": ".join(filter(None, (" ".join(filter(None, (path, line and f"({line})"))), code)))


_FRAME = re.compile(r'^ *File "(.+?)", line (\d+), in .*\n(.*)', re.MULTILINE)
#: The folders of torch and lorafx, whose frames are skipped.
_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")


@functools.lru_cache(maxsize=1000)
def users_line(trace: str) -> tuple[str, str]:
    """Place and code of the innermost frame outside torch and lorafx, or else outside lorafx."""
    frames = [match.groups() for match in _FRAME.finditer(trace)]
    if not frames:
        return "", ""
    users = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    others = [frame for frame in frames if not frame[0].startswith(_LIBRARIES[1])]
    file, line, code = (users or others or frames)[-1]
    return f"{_short_file(file)}:{line}", code.strip()


@functools.cache
def _short_file(file: str) -> str:
    """A file's path relative to its import root or the working directory."""
    folders = [*filter(None, sys.path), os.getcwd()]
    inside = [folder for folder in folders if file.startswith(folder.rstrip(os.sep) + os.sep)]
    return os.path.relpath(file, max(inside, key=len)) if inside else file


def names_of(
    stages: Iterable[Stage], sizes: Mapping[str, Size]
) -> dict[Stage, Mapping[Place, str]]:
    """The names of all nodes, by stage. A node has the same name in all stages of AOTAutograd's
    graph, and of Dynamo's; the name of a removed node may be given to a later one."""
    named: dict[Stage, Mapping[Place, str]] = {}
    names: dict[Place, str] = {}
    bases: dict[Place, str] = {}
    for stage in stages:
        if stage.report is None:  # a graph whose nodes are others
            names, bases = {}, {}
        named[stage] = names
        calls: dict[Any, fx.Node] = {}
        for node in stage.graphs[""].find_nodes(op="call_function", target=INVOKE):
            calls.setdefault(node.args[1], node)
        places = [(path, node.name) for path, graph in stage.graphs.items() for node in graph.nodes]
        used = {(place[0], names[place]) for place in places if place in names}
        for path, graph in stage.graphs.items():
            operands = iter(calls[path].args[2:] if path in calls else ())
            for node in graph.nodes:
                place = path, node.name
                operand = next(operands, None) if node.op == "placeholder" else None
                if place in names or node.op == "output":
                    continue
                if isinstance(operand, fx.Node):  # a body's input is named after its operand
                    bases[place] = bases["", operand.name]
                else:
                    bases[place] = _base_name(stage, place, node, names, sizes)
                name, number = bases[place], 0
                while (path, name) in used:
                    number += 1
                    name = f"{bases[place]}_{number}"
                used.add((path, name))
                names[place] = name
    return named


def _base_name(
    stage: Stage, place: Place, node: fx.Node, names: Mapping[Place, str], sizes: Mapping[str, Size]
) -> str:
    graph_input = stage.inputs.get(node.name) if not place[0] and node.op == "placeholder" else None
    if graph_input is not None:
        return _joined(*_input_words(node, graph_input, sizes))
    states = stage.sites.get(place)
    if states and node.target is not INVOKE:
        # These forms say less than "lora".
        unspecific = states[0].form in ("mark", "rewritten")
        return _joined("lora" if unspecific else states[0].form, [s.site.path for s in states])
    operation = _operator_name(node)
    if operation == "getitem" and isinstance(node.args[0], fx.Node):
        part = _packed_site(stage, place[0], node)
        if part is not None:
            return _joined("out", [part])
        return f"{names[place[0], node.args[0].name]}_{node.args[1]}"
    return _joined("lora" if node.target in SITE_OPS else operation, [module_path(node)])


def _input_words(
    node: fx.Node, item: FrameInput, sizes: Mapping[str, Size]
) -> tuple[str, Sequence[str]]:
    """A word for the contents of an input, and the paths of the modules that it belongs to."""
    value, part = fake_value(node), f"_{item.part}" if item.part else ""
    sites = item.group.sites if item.group is not None else item.sites
    paths = [site.path for site in sites]
    if item.kind in ("bank", "packed"):
        return f"{item.kind}_{item.label}", paths
    if item.kind == "slots":
        return item.label, ()
    if item.kind == "symbol":
        size = sizes.get(str(value)) if isinstance(value, torch.SymInt) else None
        return (identifier(item) if size is None else size.name) + part, ()
    if item.kind == "weight":
        name = item.label.rpartition(".")[2]
        name = item.sites[0].eligible.weight if item.derived is None else f"from_{name}"
        return name + part, paths[:1]
    if item.holder is not None:
        return item.holder.attribute + part, [item.holder.path]
    if item.role is not None and item.kind == "argument":
        return item.role.argument + part, ()
    return ("from_an_earlier_graph" + part if item.kind == "result" else identifier(item)), ()


def _packed_site(stage: Stage, path: str, getitem: fx.Node) -> str | None:
    split, index = getitem.args
    if not isinstance(split, fx.Node) or _operator_name(split) != "split_with_sizes":
        return None
    packed = split.args[0]
    states = stage.sites.get((path, packed.name), ()) if isinstance(packed, fx.Node) else ()
    if len(states) > 1 and isinstance(index, int) and index < len(states):
        return states[index].site.path
    return None


def _joined(word: str, paths: Sequence[str]) -> str:
    """The first path without unnumbered containers, the last parts of the others, and `word`."""
    parts = paths[0].split(".") if paths else []
    numbered = [
        part
        for part, following in itertools.zip_longest(parts, parts[1:], fillvalue="")
        if part.isdecimal() or following.isdecimal() or not following
    ]
    others = [path.rpartition(".")[2] for path in paths[1:]]
    if len(paths) > _MOST_SITES:
        others = [f"and_{len(others)}_more"]
    name = re.sub(r"\W+", "_", "_".join(filter(None, (*numbered, *others, word)))).strip("_")
    return f"module_{name}" if name[:1].isdecimal() else name or "value"


def _operator_name(node: fx.Node) -> str:
    target: Any = node.target
    if target is AUTO_FUNCTIONALIZED:
        target = node.args[0]
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2].strip("_")
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return target if isinstance(target, str) else getattr(target, "__name__", node.name)
