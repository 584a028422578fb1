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
from lorafx.viewer.stages import NodeView

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


class Printed:
    """A node as some stages have it. It holds neither the node nor what the node holds.

    Attributes:
        line: the node as a line of the program.
        value: dtype and shape of its result, or the size that it is; "" where it is neither.
        source: the comment above it: module, place and line of the user's code.
        placeholder: it is an argument of the program.
        view: what `lorafx.capture.stage_views` makes of it.
    """

    __slots__ = ("line", "placeholder", "source", "value", "view")

    def __init__(self, line: str, value: str, source: str, placeholder: bool) -> None:
        self.line = line
        self.value = value
        self.source = source
        self.placeholder = placeholder
        self.view: NodeView | None = None


#: A stage: the graph ("") and those of the modules that it calls, by their paths.
PrintedStage = tuple[tuple[str, tuple[Printed, ...]], ...]


def text_lines(stage: PrintedStage, name: str = "GraphModule") -> list[str]:
    """The stage as a program."""
    found: list[str] = []
    for path, nodes in stage:
        indent = _INDENT * (path.count(".") + 1) if path else ""
        own = [f"class {path.rpartition('.')[2] or name}(torch.nn.Module):"]
        own.append(f"{_INDENT}def forward(")
        arguments = ["self", *(node.line for node in nodes if node.placeholder)]
        own += [f"{_INDENT * 2}{argument}," for argument in arguments]
        own.append(f"{_INDENT}):")
        source = ""
        for node in nodes:
            if node.placeholder:
                continue
            if node.source and node.source != source:
                own.append(f"{_INDENT * 2}# {node.source}")
            source = node.source
            own.append(node.line)
        found += ["", *(indent + line for line in own)] if path else own
    return found


class GraphText:
    """Prints the stages of one graph. It keeps the graph's nodes: drop it when the last is printed.

    A node is taken from the stage before where everything that its line shows is the very same
    object. Stages are kept for every graph, and read only where somebody dumps, so lines are put
    together where they are read.

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
        self._printed: dict[fx.Node, tuple[tuple[Any, ...], Printed]] = {}
        self._sources: dict[tuple[Any, ...], str] = {}

    def stage(self, gm: fx.GraphModule) -> PrintedStage:
        """The graph of `gm`, and those of the modules that it calls."""
        return tuple((name, tuple(map(self.printed, graph.nodes))) for name, graph in graphs(gm))

    def printed(self, node: fx.Node) -> Printed:
        """One node; the very same object as before where nothing of it has changed."""
        shown = (node.name, node.target, node.args, node.kwargs, node.meta.get("val"))
        known = self._printed.get(node)
        if known is not None and all(map(operator.is_, known[0], shown)):
            return known[1]
        value = _value_text(node)
        line, source = _line(node, self._named, value), self._source(node)
        made = Printed(line, value, source, node.op == "placeholder")
        self._printed[node] = shown, made
        return made

    def view_of(self, node: fx.Node) -> NodeView | None:
        """The view of a node as it was printed last."""
        known = self._printed.get(node)
        return None if known is None else known[1].view

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


def graphs(gm: fx.GraphModule) -> list[tuple[str, fx.Graph]]:
    """The graph of `gm` (""), and those of the modules that it calls, by their paths."""
    return [
        (name, module.graph)
        for name, module in gm.named_modules()
        if isinstance(module, fx.GraphModule)
    ]


_FRAME = re.compile(r'^ *File "(.+?)", line (\d+), in .*\n(.*)', re.MULTILINE)
#: Folders of code that nobody looks for: a linear inside torch, a mark inside lorafx.
_INSIDE = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")


@functools.lru_cache(maxsize=1000)
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
        return f"Sym({_text(value)})"
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
        return _expression_text(value.node.expr)
    return _name(value) if callable(value) else repr(value)


@functools.lru_cache(maxsize=1000)
def _expression_text(expression: Any) -> str:
    """sympy takes as long for a size as all else takes for a line, and sizes are few."""
    return str(expression)


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
