"""Graphs as readable programs.

    # model.layers.0.mlp.up_proj (my_model.py:71): up = self.up_proj(x)
    mm: "float32[8, 352]" = torch.ops.aten.mm.default(view, permute)

The line of code is the user's own, not that of torch or lorafx inside of it. A graph is printed
after every pass, and a pass changes few of its nodes: a line is made anew only where its node has
changed. (torch's own printer takes as long for one stage as a pass.)
"""

from __future__ import annotations

import functools
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from lorafx.graph.graph_nodes import module_path

Named = Callable[[fx.Node], str]

_INDENT = "    "
#: Operators of Python that are written as such.
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


class GraphText:
    """Prints the stages of one graph. It keeps the graph's nodes: drop it when the last is printed.

    A line is taken from the stage before where everything that it shows is the very same object.

    Args:
        named: what stands for a node's name.
        path_of: the path of the module that a node belongs to, if its metadata do not say.
    """

    def __init__(
        self,
        named: Named = operator.attrgetter("name"),
        path_of: Named = lambda node: "",
    ) -> None:
        self._named = named
        self._path_of = path_of
        self._lines: dict[fx.Node, tuple[tuple[Any, ...], str]] = {}
        #: Dtype and shape of each node's result, or the size that it is; "" where it is neither.
        self.values: dict[fx.Node, str] = {}
        self._sources: dict[tuple[Any, ...], str] = {}

    def lines(self, gm: fx.GraphModule, name: str = "GraphModule") -> tuple[str, ...]:
        """The graph of `gm`, and below it those of the modules that it calls."""
        found = [f"class {name}(torch.nn.Module):", f"{_INDENT}def forward("]
        found += [f"{_INDENT * 2}{line}," for line in ("self", *self._arguments(gm.graph))]
        found.append(f"{_INDENT}):")
        source = ""
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                continue
            before, source = source, self._source(node)
            if source and source != before:
                found.append(f"{_INDENT * 2}# {source}")
            found.append(self.line(node))
        for child_name, child in gm.named_children():
            if isinstance(child, fx.GraphModule):
                found += ["", *(_INDENT + line for line in self.lines(child, child_name))]
        return tuple(found)

    def _arguments(self, graph: fx.Graph) -> list[str]:
        return [self.line(node) for node in graph.nodes if node.op == "placeholder"]

    def line(self, node: fx.Node) -> str:
        """One node; the very same object as before where nothing of it has changed."""
        shown = (node.name, node.target, node.args, node.kwargs, node.meta.get("val"))
        before, line = self._lines.get(node, ((), ""))
        if len(before) == len(shown) and all(map(operator.is_, before, shown)):
            return line
        value = self.values[node] = _value_text(node)
        line = _line(node, self._named, value)
        self._lines[node] = (shown, line)
        return line

    def _source(self, node: fx.Node) -> str:
        """The module and the line of its user's code that made the node."""
        trace, stack = node.meta.get("stack_trace"), node.meta.get("nn_module_stack")
        path = "" if stack else self._path_of(node)
        if not isinstance(trace, str):
            return path
        key = (trace, path, tuple(stack or ()))
        if key not in self._sources:
            path = path or module_path(node)
            place, code = users_line(trace)
            where = " ".join(filter(None, (path, f"({place})" if place else "")))
            self._sources[key] = ": ".join(filter(None, (where, code)))
        return self._sources[key]


_FRAME = re.compile(r'^ *File "(.+?)", line (\d+), in .*\n(.*)', re.MULTILINE)
#: Folders of code that nobody looks for: a linear inside torch, a mark inside lorafx.
_INSIDE = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")


def users_line(trace: str) -> tuple[str, str]:
    """Place and code of the innermost frame that is neither torch's nor lorafx's; where there is no
    other, of the innermost of torch's."""
    frames = [found.groups() for found in _FRAME.finditer(trace)]
    own = [frame for frame in frames if not frame[0].startswith(_INSIDE)]
    torchs = [frame for frame in frames if not frame[0].startswith(_INSIDE[1])]
    if not frames:
        return "", ""
    file, line, code = (own or torchs or frames)[-1]
    return f"{_short_file(file)}:{line}", code.strip()


@functools.cache
def _short_file(file: str) -> str:
    """A file's path from where it is imported, or from the working directory."""
    folders = [*filter(None, sys.path), os.getcwd()]
    inside = [folder for folder in folders if file.startswith(folder.rstrip(os.sep) + os.sep)]
    return os.path.relpath(file, max(inside, key=len)) if inside else file


def target_text(node: fx.Node) -> str:
    """What the node calls or gets."""
    return _text(node.target) if node.op == "call_function" else str(node.target)


def _line(node: fx.Node, named: Named, value: str) -> str:
    if node.op == "output":
        return f"{_INDENT * 2}return {_text(node.args[0], named)}"
    annotated = f'{named(node)}: "{value}"' if value else named(node)
    if node.op == "placeholder":
        return annotated
    return f"{_INDENT * 2}{annotated} = {_value(node, named)}"


def _value(node: fx.Node, named: Named) -> str:
    if node.op == "get_attr":
        return f"self.{node.target}"
    positional = [_text(item, named) for item in node.args]
    keywords = [f"{key} = {_text(item, named)}" for key, item in node.kwargs.items()]
    if node.op == "call_method":
        return f"{positional[0]}.{node.target}({', '.join([*positional[1:], *keywords])})"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join([*positional, *keywords])})"
    if node.target in _INFIX and len(positional) == 2 and not keywords:
        return _INFIX[node.target].format(*positional)
    return f"{_text(node.target, named)}({', '.join([*positional, *keywords])})"


def _value_text(node: fx.Node) -> str:
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, Tensor):
        # On a base's graph too, whose values are of any class.
        return f"{str(value.dtype).removeprefix('torch.')}{_text([*value.shape])}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"Sym({value})"
    return ""


def _text(value: Any, named: Named = operator.attrgetter("name")) -> str:
    if isinstance(value, fx.Node):
        return named(value)
    if value is None or isinstance(value, (int, float, str)):
        return repr(value)
    if isinstance(value, OpOverload):
        return f"torch.ops.{value}"
    if isinstance(value, HigherOrderOperator):
        return f"torch.ops.higher_order.{value.name()}"
    if isinstance(value, (tuple, list, slice, Mapping)):
        return _container(value, functools.partial(_text, named=named))
    if isinstance(value, Tensor):
        return f"torch.Tensor(size={[*value.shape]}, dtype={value.dtype})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    return _name(value) if callable(value) else repr(value)


def _container(value: Any, text: Callable[[Any], str]) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(text, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, slice):
        return f"slice({', '.join(map(text, (value.start, value.stop, value.step)))})"
    return "{" + ", ".join(f"{key!r}: {text(item)}" for key, item in value.items()) + "}"


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None:
        return repr(function)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else str(name)
