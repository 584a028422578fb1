"""Graphs as readable programs.

    # model.layers.0.mlp.up_proj: return F.linear(input, self.weight, self.bias)
    mm: "float32[8, 352]" = torch.ops.aten.mm.default(view, permute)

A graph is printed after every pass, and a pass changes few of its nodes: a line is made anew only
where its node has changed. (torch's own printer takes as long for one stage as a pass.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from lorafx.graph.graph_nodes import module_path

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
    """

    def __init__(self) -> None:
        self._lines: dict[fx.Node, tuple[tuple[Any, ...], str]] = {}
        self._sources: dict[tuple[Any, ...], str] = {}

    def lines(self, gm: fx.GraphModule, name: str = "GraphModule") -> tuple[str, ...]:
        """The graph of `gm`, and below it those of the modules that it calls."""
        found = [f"class {name}(torch.nn.Module):", f"{_INDENT}def forward("]
        found[-1] += ", ".join(["self", *self._arguments(gm.graph)]) + "):"
        source = ""
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                continue
            before, source = source, self._source(node)
            if source and source != before:
                found.append(f"{_INDENT * 2}# {source}")
            found.append(self._line(node))
        for child_name, child in gm.named_children():
            if isinstance(child, fx.GraphModule):
                found += ["", *(_INDENT + line for line in self.lines(child, child_name))]
        return tuple(found)

    def _arguments(self, graph: fx.Graph) -> list[str]:
        return [self._line(node) for node in graph.nodes if node.op == "placeholder"]

    def _line(self, node: fx.Node) -> str:
        shown = (node.name, node.target, node.args, node.kwargs, node.meta.get("val"))
        before, line = self._lines.get(node, ((), ""))
        if len(before) == len(shown) and all(map(operator.is_, before, shown)):
            return line
        line = _line(node)
        self._lines[node] = (shown, line)
        return line

    def _source(self, node: fx.Node) -> str:
        """The module and the line of its code that made the node."""
        trace, stack = node.meta.get("stack_trace"), node.meta.get("nn_module_stack")
        if not isinstance(trace, str):
            return ""
        key = (trace, tuple(stack or ()))
        if key not in self._sources:
            lines = [line.strip() for line in trace[-512:].splitlines()]
            code = [line for line in lines if line.strip("^~ ")]  # without Python's markers
            self._sources[key] = f"{module_path(node)}: {code[-1] if code else ''}"
        return self._sources[key]


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"{_INDENT * 2}return {_text(node.args[0])}"
    annotated = f"{node.name}{_annotation(node)}"
    if node.op == "placeholder":
        return annotated
    return f"{_INDENT * 2}{annotated} = {_value(node)}"


def _value(node: fx.Node) -> str:
    if node.op == "get_attr":
        return f"self.{node.target}"
    positional = [_text(item) for item in node.args]
    named = [f"{key} = {_text(item)}" for key, item in node.kwargs.items()]
    if node.op == "call_method":
        return f"{positional[0]}.{node.target}({', '.join([*positional[1:], *named])})"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join([*positional, *named])})"
    if node.target in _INFIX and len(positional) == 2 and not named:
        return _INFIX[node.target].format(*positional)
    return f"{_text(node.target)}({', '.join([*positional, *named])})"


def _annotation(node: fx.Node) -> str:
    """Dtype and shape of the node's result, or the size that it is."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, Tensor):
        # On a base's graph too, whose values are of any class.
        return f': "{_text(value.dtype).removeprefix("torch.")}{_text([*value.shape])}"'
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f': "Sym({value})"'
    return ""


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, OpOverload):
        return f"torch.ops.{value}"
    if isinstance(value, HigherOrderOperator):
        return f"torch.ops.higher_order.{value.name()}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(map(_text, (value.start, value.stop, value.step)))})"
    if isinstance(value, Tensor):
        return f"torch.Tensor(size={[*value.shape]}, dtype={value.dtype})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    return _name(value) if callable(value) else repr(value)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None:
        return repr(function)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else str(name)
