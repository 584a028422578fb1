"""Calls of Triton operators become their bodies, so that Inductor sees their launches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.errors import LoweringError
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound, index_of, op_of
from lorafx.torch_internals.graph_parts import (
    FakeTensor,
    OpOverload,
    make_fx,
)
from lorafx.torch_internals.triton_compat import (
    FunctionalTensorMode,
    dispatch_functionalize,
    kernel_side_table,
)

aten = torch.ops.aten


EMPTY = torch.ops.aten.empty.memory_format
KERNEL_CALL = torch.ops.higher_order.triton_kernel_wrapper_functional


def inline_triton_ops(
    gm: fx.GraphModule, ops: Collection[OpOverload], *, early: bool = False
) -> dict[fx.Node, fx.Node]:
    """Replace calls of the `triton_op`s `ops`, plain or in `auto_functionalized`, by their bodies.

    `gm` is functional, with fake tensors, and changed in place. With `early`, kernels may launch
    before their predecessor ends. Returns former nodes of results and writes -> replacements.
    Raises LoweringError if a body cannot be traced.
    """
    if early:
        from lorafx.torch_internals.inductor import launch_dependents_early

        launch_dependents_early()
    bodies: dict[object, fx.GraphModule] = {}
    shared: dict[object, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op in ops:
            replaced.update(_inline(node, op, bodies, shared))
    for node in reversed(gm.graph.nodes):
        if node.target is EMPTY and not node.users:  # its call was shared
            gm.graph.erase_node(node)
    return replaced


def _inline(
    node: fx.Node,
    op: OpOverload,
    bodies: dict[object, fx.GraphModule],
    shared: dict[object, fx.Node],
) -> dict[fx.Node, fx.Node]:
    arguments = list(bound(node).values())  # in the schema's order
    inputs = list(dict.fromkeys(item for item in _leaves(arguments) if isinstance(item, fx.Node)))
    key = (op, *(_description(item, inputs) for item in _leaves(arguments)))
    body = bodies.get(key)
    if body is None:
        body = bodies[key] = _trace_body(op, arguments, inputs)
    graph = node.graph
    with graph.inserting_before(node):
        results = _copy_body(graph, body, inputs, node, shared)
    replaced = {}
    returned = len(op._schema.returns)
    if node.target is AUTO_FUNCTIONALIZED or returned > 1:
        # For an op without results, item 0 is None and the written arguments follow.
        shift = 1 if returned == 0 else 0
        for user in list(node.users):  # getitem: results of op, then its written arguments
            index = index_of(user)
            assert user.target is operator.getitem
            assert isinstance(index, int)
            replaced[user] = results[index - shift]
    else:
        replaced[node] = results[0]
    for old, new in replaced.items():
        old.replace_all_uses_with(new)
        if old is not node:
            graph.erase_node(old)
    graph.erase_node(node)
    return replaced


def _leaves(arguments: list[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from argument
        else:
            yield argument


def _description(item: Any, inputs: list[fx.Node]) -> object:
    """What a traced body depends on: its inputs' metadata, and the values of other arguments."""
    if not isinstance(item, fx.Node):
        return (type(item), item)
    value, index = item.meta["val"], inputs.index(item)
    if isinstance(value, Tensor):
        sizes = (str(value.shape), str(value.stride()), str(value.storage_offset()))
        return (index, value.dtype, value.device, *sizes)
    return (index, str(value))


def _trace_body(op: OpOverload, arguments: list[Any], inputs: list[fx.Node]) -> fx.GraphModule:
    position = {node: index for index, node in enumerate(inputs)}
    mutated = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]

    def body(*values: Any) -> list[Any]:
        def value(item: Any) -> Any:
            if isinstance(item, (list, tuple)):
                return [value(part) for part in item]
            return values[position[item]] if isinstance(item, fx.Node) else item

        operands = [value(argument) for argument in arguments]
        returned = op(*operands)
        returned = () if returned is None else returned
        written = [item for item, writes in zip(operands, mutated, strict=True) if writes]
        return [*(returned if isinstance(returned, tuple) else (returned,)), *written]

    fakes = [node.meta["val"] for node in inputs]
    mode = next(value.fake_mode for value in fakes if isinstance(value, FakeTensor))
    functional: Callable[..., Any] = dispatch_functionalize(body, FunctionalTensorMode())
    try:
        with mode:
            return make_fx(functional)(*fakes)
    except Exception as error:
        raise LoweringError(f"{op} could not be traced into the graph: {error}") from error


def _copy_body(
    graph: fx.Graph,
    body: fx.GraphModule,
    inputs: list[fx.Node],
    origin: fx.Node,
    shared: dict[object, fx.Node],
) -> list[Any]:
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = iter(inputs)
    results: list[Any] = []
    for node in body.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(placeholders)
        elif node.op == "output":
            results = [copies[item] for item in node.args[0]]
        else:
            key = _value_key(node, copies)
            if node.target is not EMPTY and key in shared:
                copies[node] = shared[key]
                continue
            copies[node] = graph.node_copy(node, lambda item: copies[item])
            shared[key] = copies[node]
            for name in ("nn_module_stack", "stack_trace"):
                if name in origin.meta:
                    copies[node].meta[name] = origin.meta[name]
    return results


def _value_key(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> object:
    """Equal for equal computations; sizes are compared by expression, new buffers by size."""
    if isinstance(node.meta.get("val"), torch.SymInt):
        return str(node.meta["val"])

    def described(item: Any) -> object:
        if isinstance(item, fx.Node):
            is_size = isinstance(item.meta.get("val"), torch.SymInt)
            return _value_key(item, copies) if is_size or item.target is EMPTY else copies[item]
        if isinstance(item, dict):
            return tuple((name, described(value)) for name, value in item.items())
        if isinstance(item, (list, tuple)):
            return tuple(described(value) for value in item)
        return (type(item), item)

    kwargs: dict[str, Any] = dict(node.kwargs)
    if node.target is KERNEL_CALL:  # ids of kernel and constants differ by trace
        kernel = kernel_side_table.get_kernel(kwargs.pop("kernel_idx"))
        constants = kernel_side_table.get_constant_args(kwargs.pop("constant_args_idx"))
        options = [str(config) for config in getattr(kernel, "configs", ())]
        kwargs |= {"kernel": id(getattr(kernel, "fn", kernel)), "options": options}
        kwargs |= {"constants": str(constants)}
    return (node.target, described(node.args), described(kwargs))
