"""Graphs as readable programs.

    # model.layers.0.mlp.up_proj (my_model.py:71): up = self.up_proj(x)
    mm: "float32[8, 352]" = torch.ops.aten.mm.default(view, permute)

The line of code is the user's own, not that of torch or lorafx inside of it. A graph is kept after
every pass, and a pass changes few of its nodes: what a line shows is noted anew only where its node
has changed. Lines are put together where they are read. (torch's own printer takes as long for one
stage as a pass.)
"""

from __future__ import annotations

import functools
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from lorafx.graph.context import plain_path
from lorafx.torch_internals.frames import size_expression
from lorafx.torch_internals.operators import HigherOrderOperator, OpOverload

NameOf = Callable[[fx.Node], str]

_INDENT = "    "
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: What arguments hold that neither keeps anything alive nor changes.
_PLAIN = (
    *(int, float, complex, str, OpOverload, HigherOrderOperator),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
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


@dataclass(frozen=True, slots=True)
class AsText:
    """Something of which its text is kept."""

    text: str


class Printed:
    """A node as some stages have it. It holds neither the node nor tensors that the node holds.

    Attributes:
        name: what stands for the node's name.
        op, target: as the node has them; a target that nothing but its text is known of is that.
        args, kwargs: the node's, with the nodes in them as they were printed.
        dtype, shape: of the tensor that it returns; a symbolic size is an expression. None where it
            returns none.
        symbol: the size that it is, as text, or "".
        path, trace, stack: what the metadata of the node say about the code that made it.
        seen: what `lorafx.capture.stage_views` notes of it.
    """

    __slots__ = (
        "_line",
        "_source",
        "args",
        "dtype",
        "kwargs",
        "name",
        "op",
        "path",
        "seen",
        "shape",
        "stack",
        "symbol",
        "target",
        "trace",
    )

    def __init__(self, node: fx.Node, name: str, path: str, kept: Callable[[Any], Any]) -> None:
        self.name = name
        self.op = node.op
        self.target = _kept_target(node.target)
        self.args: Any = map_aggregate(node.args, kept)
        self.kwargs: Any = map_aggregate(node.kwargs, kept)
        value = node.meta.get("val", node.meta.get("example_value"))
        self.dtype: torch.dtype | None = None
        self.shape: tuple[Any, ...] | None = None
        self.symbol = ""
        if isinstance(value, Tensor):  # on a base's graph too, whose values are of any class
            self.dtype, self.shape = value.dtype, tuple(map(size_expression, value.shape))
        elif isinstance(value, _SYMBOLIC):
            self.symbol = f"Sym({_text(value)})"
        trace = node.meta.get("stack_trace")
        self.trace = trace if isinstance(trace, str) else None
        self.stack: Mapping[Any, Any] = node.meta.get("nn_module_stack") or {}
        self.path = path
        self._line: str | None = None
        self._source: str | None = None
        self.seen: Any = None

    @property
    def placeholder(self) -> bool:
        """Whether it is an argument of the program."""
        return self.op == "placeholder"

    @property
    def value(self) -> str:
        """dtype and shape of its result, or the size that it is; "" where it is neither."""
        if self.shape is None:
            return self.symbol
        sizes = ", ".join(map(_size_text, self.shape))
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the nodes that it takes, each once."""
        found: dict[str, None] = {}

        def note(item: Any) -> Any:
            if isinstance(item, Printed):
                found[item.name] = None
            return item

        map_aggregate((self.args, self.kwargs), note)
        return tuple(found)

    @property
    def line(self) -> str:
        """The node as a line of the program."""
        if self._line is None:
            self._line = _line(self)
        return self._line

    @property
    def source(self) -> str:
        """The comment above it: module, place and line of the user's code."""
        if self._source is None:
            self._source = self.path
            if self.trace is not None:
                place, code = users_line(self.trace)
                path = self.path or innermost_path(self.stack)
                where = " ".join(filter(None, (path, f"({place})" if place else "")))
                self._source = ": ".join(filter(None, (where, code)))
        return self._source


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
        named: NameOf = operator.attrgetter("name"),
        path_of: NameOf = lambda node: "",
    ) -> None:
        self._named = named
        self._path_of = path_of
        self._printed: dict[fx.Node, tuple[str, Any, Any, Any, Any, Printed]] = {}

    def stage(self, gm: fx.GraphModule) -> PrintedStage:
        """The graph of `gm`, and those of the modules that it calls."""
        return tuple((name, tuple(map(self.printed, graph.nodes))) for name, graph in graphs(gm))

    def printed(self, node: fx.Node) -> Printed:
        """One node; the very same object as before where nothing of it has changed."""
        known = self._printed.get(node)
        if known is not None:
            name, target, args, kwargs, value, printed = known
            if (
                args is node.args
                and kwargs is node.kwargs
                and value is node.meta.get("val")
                and target is node.target
                and name is node.name
            ):
                return printed
        # No line has an output's name.
        name = node.name if node.op == "output" else self._named(node)
        path = "" if node.meta.get("nn_module_stack") else self._path_of(node)
        made = Printed(node, name, path, self._kept)
        value = node.meta.get("val")
        self._printed[node] = node.name, node.target, node.args, node.kwargs, value, made
        return made

    def latest(self, node: fx.Node) -> Printed | None:
        """A node as it was printed last."""
        known = self._printed.get(node)
        return None if known is None else known[-1]

    def _kept(self, value: Any) -> Any:
        """A part of an argument as it is kept."""
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, fx.Node):
            return self.latest(value) or self.printed(value)
        return AsText(_text(value))


def _kept_target(target: Any) -> Any:
    plain = isinstance(target, (str, OpOverload, HigherOrderOperator)) or target in _INFIX
    return target if plain else AsText(_text(target))


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


def innermost_path(stack: Mapping[Any, Any]) -> str:
    """The path of the last module of `nn_module_stack`, "" where there is none."""
    return plain_path([*stack.values()][-1][0]) if stack else ""


def target_text(printed: Printed) -> str:
    """What the node calls or gets."""
    target = printed.target
    return _text(target) if printed.op == "call_function" else str(target)


def _line(printed: Printed) -> str:
    if printed.op == "output":
        return f"{_INDENT * 2}return {_text(printed.args[0])}"
    value = printed.value
    annotated = f'{printed.name}: "{value}"' if value else printed.name
    if printed.placeholder:
        return annotated
    return f"{_INDENT * 2}{annotated} = {_value(printed)}"


def _value(printed: Printed) -> str:
    target = printed.target
    if printed.op == "get_attr":
        return f"self.{target}"
    positional = list(map(_text, printed.args))
    keywords = [f"{key} = {_text(item)}" for key, item in printed.kwargs.items()]
    if printed.op == "call_method":
        return f"{positional[0]}.{target}({', '.join([*positional[1:], *keywords])})"
    if printed.op == "call_module":
        return f"self.{target}({', '.join([*positional, *keywords])})"
    if target in _INFIX and len(positional) == 2 and not keywords:
        return _INFIX[target].format(*positional)
    return f"{_text(target)}({', '.join([*positional, *keywords])})"


def _size_text(size: Any) -> str:
    return str(size) if isinstance(size, int) else _expression_text(size)


def _text(value: Any) -> str:
    if isinstance(value, Printed):
        return value.name
    if isinstance(value, AsText):
        return value.text
    if value is None or isinstance(value, (int, float, str)):
        return repr(value)
    if isinstance(value, OpOverload):
        return f"torch.ops.{value}"
    if isinstance(value, HigherOrderOperator):
        return f"torch.ops.higher_order.{value.name()}"
    if isinstance(value, (tuple, list, slice, Mapping)):
        return _container(value)
    if isinstance(value, Tensor):
        return f"torch.Tensor(size={[*value.shape]}, dtype={value.dtype})"
    if isinstance(value, _SYMBOLIC):
        return _expression_text(value.node.expr)
    return _name(value) if callable(value) else repr(value)


@functools.lru_cache(maxsize=1000)
def _expression_text(expression: Any) -> str:
    """sympy takes as long for a size as all else takes for a line, and sizes are few."""
    return str(expression)


def _container(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, slice):
        return f"slice({', '.join(map(_text, (value.start, value.stop, value.step)))})"
    return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in value.items()) + "}"


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None:
        return repr(function)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else str(name)
