"""New nodes of a functional ATen graph, and where a node came from."""

from __future__ import annotations

import functools
import operator
import re
from typing import Any

from torch import fx

from lorafx.op_arguments import AUTO_FUNCTIONALIZED
from lorafx.program.frame import fake_value
from lorafx.torch_internals.operators import OpOverload


def call_in_place(graph: fx.Graph, op: OpOverload, arguments: tuple[Any, ...]) -> fx.Node:
    """The first argument, y, after `op` has written it, as functional nodes.

    The op is wrapped in `auto_functionalized`: Inductor decides whether y's buffer may be written
    without a copy.
    """
    names = [argument.name for argument in op._schema.arguments]
    both = graph.call_function(
        AUTO_FUNCTIONALIZED,
        (op,),
        dict(zip(names, arguments, strict=True)),
    )
    value = fake_value(arguments[0])
    both.meta["val"] = (None, value)
    with graph.inserting_after(both):
        written = graph.call_function(operator.getitem, (both, 1))
    written.meta["val"] = value
    return written


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made `node`, or "" where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        return plain_path(path)
    return ""


#: The module whose forward is traced, by whatever name its forward has for it.
_ROOT = re.compile(r"^L\['\w+'\]")


@functools.lru_cache(maxsize=4096)
def plain_path(path: str) -> str:
    """Dynamo's module path as a dotted path: `L['self']._modules['model']` -> `model`."""
    text = _ROOT.sub("", path).replace(".__dict__['_modules']", "._modules")
    text = text.replace("._modules[", ".[").replace("['", ".")
    text = text.replace('["', ".").replace("']", "").replace('"]', "").replace("..", ".")
    return text.strip(".")
