"""Graphs as readable programs, with the user's lines of code.

# model.layers.0.mlp.up_proj (my_model.py:71): up = self.up_proj(x)
mm: "float32[8, 352]" = torch.ops.aten.mm.default(view, permute)
"""

from __future__ import annotations

import functools
import operator
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.recorder import Place, Stage
from lorafx.program.context import module_path
from lorafx.torch_internals.operators import HigherOrderOperator, OpOverload

_INDENT = "    "
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_INFIX: dict[Any, str] = {
    operator.getitem: "{}[{}]",
    operator.add: "{} + {}",
    operator.sub: "{} - {}",
    operator.mul: "{} * {}",
    operator.floordiv: "{} // {}",
    operator.truediv: "{} / {}",
    operator.mod: "{} % {}",
    operator.eq: "{} == {}",
    operator.ne: "{} != {}",
    operator.lt: "{} < {}",
    operator.le: "{} <= {}",
    operator.gt: "{} > {}",
    operator.ge: "{} >= {}",
}


class Printer:
    """Prints the nodes of a stage's graph at `path` ("": the main graph) under given `names`."""

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
        if target in _INFIX and len(positional) == 2 and not keywords:
            return _INFIX[target].format(*positional)
        if node.op == "call_method":
            called = f"{positional.pop(0)}.{target}"
        else:
            called = f"self.{target}" if node.op == "call_module" else self.text(target)
        return f"{called}({', '.join([*positional, *keywords])})"

    def text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.name(value)
        if value is None or isinstance(value, (int, float, str)):
            return repr(value)
        if isinstance(value, OpOverload):
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


def value_of(node: fx.Node) -> Any:
    """The fake value, from AOTAutograd or Dynamo."""
    return node.meta.get("val", node.meta.get("example_value"))


def value_text(node: fx.Node) -> str:
    """dtype and shape, or the value of a size; else ""."""
    value = value_of(node)
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return f"Sym({value.node.expr})" if isinstance(value, _SYMBOLIC) else ""


def path_of(stage: Stage, place: Place, node: fx.Node) -> str:
    """The module that made a node, or the site that a pass made it for."""
    sites = stage.sites.get(place)
    return module_path(node) or (sites[0].site.path if sites else "")


def stage_lines(stage: Stage, names: Mapping[Place, str]) -> list[str]:
    """The stage as a program, followed by the bodies that it calls."""
    found: list[str] = []
    for path, graph in stage.graphs.items():
        printer = Printer(path, names)
        arguments = ["self", *map(printer.line, graph.find_nodes(op="placeholder"))]
        own = [
            f"class {path.rpartition('.')[2] or 'GraphModule'}(torch.nn.Module):",
            f"{_INDENT}def forward(",
            *(f"{_INDENT * 2}{argument}," for argument in arguments),
            f"{_INDENT}):",
        ]
        last = ""
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            comment = _comment(stage, (path, node.name), node)
            if comment and comment != last:
                own.append(f"{_INDENT * 2}# {comment}")
            last = comment
            own.append(_INDENT * 2 + printer.line(node))
        indent = _INDENT * (path.count(".") + 1) if path else ""
        found += ["", *(indent + line for line in own)] if path else own
    return found


def _comment(stage: Stage, place: Place, node: fx.Node) -> str:
    source = node.meta.get("stack_trace")
    path = path_of(stage, place, node)
    if not isinstance(source, str):
        return "" if module_path(node) else path
    where, code = users_line(source)
    return ": ".join(filter(None, (" ".join(filter(None, (path, where and f"({where})"))), code)))


_FRAME = re.compile(r'^ *File "(.+?)", line (\d+), in .*\n(.*)', re.MULTILINE)
#: Code inside torch and lorafx is skipped.
_INSIDE = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")


@functools.lru_cache(maxsize=1000)
def users_line(trace: str) -> tuple[str, str]:
    """Place and code of the innermost frame outside torch and lorafx, or else of torch's."""
    frames = [found.groups() for found in _FRAME.finditer(trace)]
    if not frames:
        return "", ""
    users = [frame for frame in frames if not frame[0].startswith(_INSIDE)]
    torchs = [frame for frame in frames if not frame[0].startswith(_INSIDE[1])]
    file, line, code = (users or torchs or frames)[-1]
    return f"{_short_file(file)}:{line}", code.strip()


@functools.cache
def _short_file(file: str) -> str:
    """A file's path relative to its import root or the working directory."""
    folders = [*filter(None, sys.path), os.getcwd()]
    inside = [folder for folder in folders if file.startswith(folder.rstrip(os.sep) + os.sep)]
    return os.path.relpath(file, max(inside, key=len)) if inside else file
