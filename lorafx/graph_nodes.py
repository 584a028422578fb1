"""New nodes of a functional ATen graph, and where a node came from."""

from __future__ import annotations

import re
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafx.frame import fake_value


def call_function(
    fake_mode: FakeTensorMode, graph: fx.Graph, target: Any, args: tuple[Any, ...], **kwargs: Any
) -> fx.Node:
    """A call_function node with its fake value, at the graph's insertion point. `kwargs` are
    constants."""
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg(args, fake_value)
    with fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    return node


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made `node`, or "" where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        return plain_path(path)
    return ""


#: The module whose forward is traced, by whatever name its forward has for it.
_ROOT = re.compile(r"^L\['\w+'\]")


def plain_path(path: str) -> str:
    """Dynamo's module path as a dotted path: `L['self']._modules['model']` -> `model`."""
    text = _ROOT.sub("", path).replace(".__dict__['_modules']", "._modules")
    text = text.replace("._modules[", ".[").replace("['", ".")
    text = text.replace('["', ".").replace("']", "").replace('"]', "").replace("..", ".")
    return text.strip(".")
