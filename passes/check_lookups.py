"""Checks of the indices of a graph against the sizes of the tables that they point into.

    F.embedding(f(input_ids), W)  →  F.embedding(checked_index(f(input_ids)), W)
    hidden[argmax(logits)]           is left as it is: such an index is in range by construction

Generated CPU code checks indices on several threads, where an error ends the process. So indices
that are computed from a call's tensors and sizes are checked before that code, and the error names
them. Tensors on a GPU are not checked, since the host would have to wait.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from lorafx.errors import some
from lorafx.kernels.ops.row_ops import CHECKED_INDEX
from lorafx.model.module_graph import storage_key
from lorafx.ownership.propagate import ancestors
from lorafx.placements import is_placed
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.program.inputs import FrameInput
from lorafx.torch_internals.frames import size_expression

#: Functions and methods with arguments (table, dim, index, ...).
_BY_DIM = frozenset(
    (
        *("gather", "index_select", "index_copy", "index_add", "index_fill", "scatter"),
        *("scatter_add", "index_copy_", "index_add_", "index_fill_", "scatter_", "scatter_add_"),
        *("index_reduce", "index_reduce_", "scatter_reduce", "scatter_reduce_"),
    )
)
#: Methods that change the layout or dtype of integers, not their values.
_LAYOUT_METHODS = frozenset(
    (
        *("view", "reshape", "flatten", "contiguous", "clone", "unsqueeze", "squeeze", "expand"),
        *("to", "long", "transpose", "permute", "detach"),
    )
)
#: Functions that begin and end a level of `torch.vmap` in Dynamo's graphs.
_LEVELS = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
#: Kinds of inputs that differ from call to call.
_OF_CALL = ("symbol", "argument", "result", "unknown")
#: Functions that return indices into their operand: alone, or after the values.
_RETURN_INDICES = frozenset(("argmax", "argmin", "argsort", "multinomial", "nonzero"))
_RETURN_INDICES_SECOND = frozenset(("kthvalue", "max", "median", "min", "mode", "sort", "topk"))


class _Lookup(NamedTuple):
    """`indices` point into dimension `dim` of `table`, or into all elements if that is None."""

    indices: fx.Node
    table: fx.Node
    dim: int | None
    negative: bool = False
    ignored: int | None = None


class _Sources:
    """The origins of the values of a Dynamo graph.

    Attributes:
        inputs: the inputs of the graph, by node.
        of_call: nodes computed from a call's tensors and sizes.
        written: the roots of tensors that some node writes into.
        mapped: nodes inside `torch.vmap`, which only run at its level.
    """

    def __init__(self, graph: fx.Graph, inputs: dict[fx.Node, FrameInput]) -> None:
        self.inputs = inputs
        self.of_call: set[fx.Node] = set()
        self.written: set[Any] = set()
        self.mapped: set[fx.Node] = set()
        self._filled: set[Any] = set()
        levels = 0
        for node in graph.nodes:
            levels += _LEVELS.get(getattr(node.target, "__name__", ""), 0)
            if levels:
                self.mapped.add(node)
            item = self.inputs.get(node)
            computed = not _returns_index(node) and any(map(self.is_of_call, node.all_input_nodes))
            if computed if item is None else item.kind in _OF_CALL:
                self.of_call.add(node)
            roots = set(map(_root, _written_operands(node)))
            self.written |= roots
            if node in self.of_call:
                self._filled |= roots

    def is_of_call(self, node: fx.Node) -> bool:
        return node in self.of_call or _root(node) in self._filled

    def name(self, index: fx.Node) -> str:
        """What an error calls the index; `{}` stands for the position of an entry."""
        if index in self.inputs:
            return f"{_input_name(self.inputs[index])}{{}}"
        made_of = self.of_call & ancestors([index], self.of_call.__contains__)
        tensors = [n for n in self.inputs if n in made_of and isinstance(_fake(n), Tensor)]
        names = some(dict.fromkeys(_input_name(self.inputs[node]) for node in tensors))
        return f"the index {{}} that the model makes of {names or 'the sizes of this call'}"

    def table_name(self, use: _Lookup) -> str:
        item = self.inputs.get(use.table)
        name = "" if item is None else _input_name(item)
        if name and not re.search(r"\d", name):  # numbers of layers would make equal layers differ
            return name
        return f"the {'tensor' if use.dim is None else f'dimension {use.dim}'} that it points into"


@dataclass(frozen=True)
class CheckLookups:
    """Indices that depend on the call are compared with the sizes of tables before the graph runs.

    It rewrites Dynamo's graph, whose functions have the names of the model's code, also for calls
    without adapters.
    """

    name: str = "check_lookups"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        sources = _Sources(gm.graph, ctx.frame.by_node)
        checked: dict[fx.Node, fx.Node] = {}
        known: set[tuple[Any, ...]] = set()
        edits = 0
        lookups = [(node, use) for node in gm.graph.nodes for use in _lookups(node)]
        for node, use in lookups:
            table = _fake(use.table)
            if not _is_host_index(_fake(use.indices)) or not sources.is_of_call(use.indices):
                continue
            if not isinstance(table, Tensor):
                continue
            if use.dim is not None and not -table.dim() <= use.dim < table.dim():
                continue
            index = _before_layout(use.indices)
            if is_placed(_fake(index)):
                continue  # no copy of a DTensor is checked
            if _root(index) in sources.written:
                _insert_check(use.indices, use, sources, reader=node)
                edits += 1
                continue
            key = index, size_expression(_size(table, use.dim)), use.negative, use.ignored
            if key not in known:
                known.add(key)
                checked[index] = _insert_check(checked.get(index, index), use, sources)
                edits += 1
        return edits


def _insert_check(
    index: fx.Node, use: _Lookup, sources: _Sources, reader: fx.Node | None = None
) -> fx.Node:
    """Insert a checked copy of `index`: for `reader` alone if given, before it; else for all later
    readers, as soon as the table's size is known, so that equal layers stay equal."""
    graph, table, dim = index.graph, use.table, use.dim
    size: Any = _size(_fake(table), dim)
    symbolic = isinstance(size, torch.SymInt)
    needed = [index, *list(sources.inputs)[-1:], *[table] * symbolic]
    origin, keys = reader or index, ("nn_module_stack", "stack_trace")
    meta = {key: origin.meta[key] for key in keys if key in origin.meta}
    with graph.inserting_before(reader or max(needed).next):
        if symbolic:
            method, dims = ("numel", ()) if dim is None else ("size", (dim,))
            entries = graph.call_method(method, (table, *dims))
            entries.meta.update(meta, example_value=size)
            size = entries
        names = sources.table_name(use), sources.name(_before_layout(use.indices))
        arguments = (index, size, use.negative, use.ignored, *names)
        checked = graph.call_function(CHECKED_INDEX, arguments)
    value = _fake(index)
    value = value if index in sources.mapped else torch.empty_like(value)
    checked.meta.update(meta, example_value=value)
    index.replace_all_uses_with(
        checked,
        delete_user_cb=lambda user: (
            user is reader or (reader is None and user > checked and user.op != "output")
        ),
    )
    if reader is not None and table is index:  # `ids[ids] = 0` writes into ids
        reader.update_arg(0, index)
    return checked


def _lookups(node: fx.Node) -> Iterator[_Lookup]:
    target, args, kwargs = node.target, node.args, node.kwargs
    name = _function_name(node)

    def argument(place: int, name: str) -> Any:
        return args[place] if len(args) > place else kwargs.get(name)

    if target is functional.embedding:
        yield from _lookup(argument(0, "input"), argument(1, "weight"), 0)
    elif target is torch.embedding:
        yield from _lookup(argument(1, "indices"), argument(0, "weight"), 0)
    elif target in (functional.cross_entropy, functional.nll_loss):
        logits, ignored = _fake(argument(0, "input")), argument(4, "ignore_index")
        if isinstance(logits, Tensor) and isinstance(ignored, (int, type(None))):
            number = -100 if ignored is None else ignored
            dim = 0 if logits.dim() == 1 else 1
            yield from _lookup(argument(1, "target"), argument(0, "input"), dim, ignored=number)
    elif target in (operator.getitem, operator.setitem):
        yield from _subscript_lookups(args[0], args[1])
    elif name in _BY_DIM:
        dim = argument(1, "dim")
        if isinstance(dim, int):
            negative = name.startswith("index_fill")
            yield from _lookup(argument(2, "index"), argument(0, "input"), dim, negative=negative)
    elif name == "take_along_dim":
        yield from _lookup(argument(1, "indices"), argument(0, "input"), argument(2, "dim"))
    elif name in ("take", "put", "put_"):
        yield from _lookup(argument(1, "index"), argument(0, "input"), None, negative=True)
    elif name in ("index_put", "index_put_"):
        yield from _subscript_lookups(argument(0, "input"), tuple(argument(1, "indices")))


def _lookup(
    index: Any, table: Any, dim: int | None, *, negative: bool = False, ignored: int | None = None
) -> Iterator[_Lookup]:
    if isinstance(index, fx.Node) and isinstance(table, fx.Node):
        yield _Lookup(index, table, dim, negative, ignored)


def _returns_index(node: fx.Node) -> bool:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return bool(node.args[1] == 1) and _function_name(node.args[0]) in _RETURN_INDICES_SECOND
    return _function_name(node) in _RETURN_INDICES


def _function_name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _subscript_lookups(table: Any, subscript: Any) -> Iterator[_Lookup]:
    items = subscript if isinstance(subscript, tuple) else (subscript,)
    sizes = [_indexed_dims(item) for item in items]
    dim = 0
    for place, item in enumerate(items):
        value = _fake(item)
        if item is Ellipsis:
            whole = _fake(table)
            if not isinstance(whole, Tensor):
                return
            dim = whole.dim() - sum(sizes[place + 1 :])
        elif _is_host_index(value):
            yield from _lookup(item, table, dim, negative=True)
        dim += sizes[place]


def _indexed_dims(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    value = _fake(item)
    return value.dim() if isinstance(value, Tensor) and value.dtype == torch.bool else 1


def _size(table: Tensor, dim: int | None) -> int | torch.SymInt:
    return table.numel() if dim is None else table.shape[dim]


def _fake(item: Any) -> Any:
    return fake_value(item) if isinstance(item, fx.Node) else None


def _is_host_index(value: Any) -> bool:
    """Whether a value is a tensor of integers in the host's memory."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _before_layout(node: fx.Node) -> fx.Node:
    """The node that computed the integers of `node`, before changes of their layout."""
    while (node.op == "call_method" and node.target in _LAYOUT_METHODS) or is_placed(_fake(node)):
        before = node.args[0]
        if not isinstance(before, fx.Node) or not _is_host_index(_fake(before)):
            break
        node = before
    return node


_IN_PLACE = frozenset(
    (
        *(operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imod),
        *(operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub),
        *(operator.itruediv, operator.ixor, operator.imatmul, operator.setitem),
    )
)


def _written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that a node may write: by schema, in-place name, `out=` or `inplace=True`."""
    if node.op not in ("call_function", "call_method"):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return node.all_input_nodes if schema.is_mutable else []
    outs = node.kwargs.get("out")
    written = list(outs) if isinstance(outs, (list, tuple)) else [outs]
    name = _function_name(node)
    in_place = name.endswith("_") and not name.endswith("__")
    in_place &= getattr(node.target, "__module__", "") != "_operator"  # and_, or_, not_
    if node.args and (in_place or node.target in _IN_PLACE or node.kwargs.get("inplace")):
        written.append(node.args[0])
    return [item for item in written if isinstance(item, fx.Node)]


def _root(item: Any) -> Any:
    """The node at the beginning of a chain of possible views."""
    while isinstance(item, fx.Node) and item.op != "placeholder" and item.args:
        if not isinstance(item.args[0], fx.Node) or not _may_share(item, item.args[0]):
            break
        item = item.args[0]
    return item


def _may_share(node: fx.Node, other: fx.Node) -> bool:
    a, b = _fake(node), _fake(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    return storage_key(a) == storage_key(b)


def _input_name(item: FrameInput) -> str:
    return item.label if item.role is None else item.role.argument
