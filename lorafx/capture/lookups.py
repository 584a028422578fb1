"""Checks of a graph's table indices against the tables' sizes.

    F.embedding(f(input_ids), W)     f is small and pure → computed once more, before the graph runs
    F.embedding(g(input_ids), W)     otherwise → F.embedding(checked_index(g(input_ids)), W)
    hidden[argmax(logits)]           a place that the model has found → in range by construction

Generated CPU code checks indices on all threads at once, and an error there ends the process. So
indices made from a call's tensors and sizes are checked on the host, with an error that names them.
Tensors on a GPU are not checked, since the host would wait.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.nn import functional

from lorafx.capture.tracking import untracked
from lorafx.errors import some
from lorafx.kernels.ops.checked_index import CHECKED_INDEX, refuse_outside
from lorafx.model.module_graph import storage_key
from lorafx.program.frame import Frame, FrameInput
from lorafx.torch_internals.frames import size_expression
from lorafx.torch_internals.operators import OperatorBase

#: Functions and methods (table, dim, index, ...).
_BY_DIM = frozenset(
    (
        *("gather", "index_select", "index_copy", "index_add", "index_fill", "scatter"),
        *("scatter_add", "index_copy_", "index_add_", "index_fill_", "scatter_", "scatter_add_"),
        *("index_reduce", "index_reduce_", "scatter_reduce", "scatter_reduce_"),
    )
)
#: Methods whose integer results have the operand's numbers.
_SAME = frozenset(
    (
        *("view", "reshape", "flatten", "contiguous", "clone", "unsqueeze", "squeeze", "expand"),
        *("to", "long", "transpose", "permute", "detach"),
    )
)
#: Deterministic functions of sizes.
_FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.full)
#: Functions that begin and end a level of `torch.vmap` in Dynamo's graphs.
_LEVELS = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
#: Random functions.
_BY_CHANCE = frozenset(
    (
        *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand_like),
        *(torch.randn_like, torch.randint_like, functional.dropout, "bernoulli", "multinomial"),
    )
)
#: Kinds of inputs that come from a call.
_OF_CALL = ("symbol", "argument", "result", "unknown")
#: Functions whose results are places in their operand, alone or after the values.
_FOUND = frozenset(("argmax", "argmin", "argsort", "multinomial", "nonzero"))
_FOUND_BESIDE = frozenset(("kthvalue", "max", "median", "min", "mode", "sort", "topk"))
#: Limits: operations on the way to an index, and numbers in each at capture.
_LONGEST, _NUMBERS = 24, 1 << 16


@dataclass(frozen=True)
class Value:
    """The value of an input or, numbered after the inputs, of a step."""

    number: int


@dataclass(frozen=True)
class LookupStep:
    """One operation of a check; a method is a name. Indices are looked at by `refuse_outside`."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, values: Sequence[Any]) -> Any:
        given: Any = map_aggregate(
            (self.args, self.kwargs),
            lambda item: values[item.number] if isinstance(item, Value) else item,
        )
        function, (args, kwargs) = self.function, given
        if isinstance(function, str):
            function, args = getattr(args[0], function), args[1:]
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Lookups:
    """Steps before a graph, saved with it; a lookup comes after the check of its index."""

    steps: tuple[LookupStep, ...] = ()

    def check(self, inputs: Sequence[Any]) -> None:
        values = list(inputs)
        for step in self.steps:
            values.append(step.run(values))

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        if not self.steps:
            return compiled

        def run(*arguments: Any) -> Any:
            untracked(lambda _: self.check(arguments))
            return compiled(*arguments)

        return run


class _Use(NamedTuple):
    pointer: fx.Node
    table: fx.Node
    dim: int | None
    negative: bool = False
    ignored: int | None = None


#: A number, the size of an input's dimension, or a size input.
_Size = int | tuple[fx.Node, int | None]


class LookupSearch:
    """Finds a Dynamo graph's indices; `lookups` are those checked before it runs."""

    def __init__(self, graph: fx.Graph, frame: Frame) -> None:
        self._graph = graph
        inputs = graph.find_nodes(op="placeholder")
        self._items: dict[fx.Node, FrameInput] = dict(zip(inputs, frame.inputs, strict=True))
        self._known = {node: Value(number) for number, node in enumerate(inputs)}
        self._steps: list[LookupStep] = []
        #: The first node that writes into what a node is a view of.
        self._first_writes: dict[Any, fx.Node] = {}
        #: Nodes inside `torch.vmap`, which only run at its level.
        self._mapped: set[fx.Node] = set()
        #: Nodes computed from a call's tensors and sizes, and tensors that these are written into.
        self._of_call: set[fx.Node] = set()
        self._filled: set[Any] = set()
        #: Call-dependent indices that cannot be checked beforehand, with their users.
        self._left: list[tuple[fx.Node, _Use]] = []
        levels = 0
        for node in graph.nodes:
            levels += _LEVELS.get(getattr(node.target, "__name__", ""), 0)
            if levels:
                self._mapped.add(node)
            item = self._items.get(node)
            made = not _is_place(node) and any(map(self._is_of_call, node.all_input_nodes))
            if made if item is None else item.kind in _OF_CALL:
                self._of_call.add(node)
            for written in _written(node):
                self._first_writes.setdefault(_root(written), node)
                if node in self._of_call:
                    self._filled.add(_root(written))
        self.lookups = self._search()

    def _search(self) -> Lookups:
        seen: set[tuple[Any, ...]] = set()
        for node in self._graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            for use in _uses(node):
                index = _same_numbers(use.pointer)
                value, table = _value(index), _value(use.table)
                if not isinstance(value, Tensor) or not _counts(value):
                    continue
                if not isinstance(table, Tensor):
                    continue
                if use.dim is not None and not -table.dim() <= use.dim < table.dim():
                    continue
                size = self._size(use)
                way = None if size is None or node in self._mapped else self._way(index, node)
                if size is None or way is None:
                    if self._is_of_call(use.pointer):
                        self._left.append((node, use))
                    continue
                key = index, size, use.negative, use.ignored
                if key not in seen:
                    seen.add(key)
                    self._add(use, index, size, way)
        return Lookups(tuple(self._steps))

    def check_inside(self, gm: fx.GraphModule) -> None:
        for node, use in self._left:
            self._check_inside(node, use)
        if self._left:
            gm.recompile()

    def _check_inside(self, node: fx.Node, use: _Use) -> None:
        graph, index, table, dim = node.graph, use.pointer, use.table, use.dim
        value, size = _value(index), _entries(_value(table), dim)
        if node not in self._mapped:
            value = torch.empty_like(value)
        origin = ("nn_module_stack", "stack_trace")
        meta: dict[str, Any] = {key: node.meta[key] for key in origin if key in node.meta}
        with graph.inserting_before(node):
            number: Any = size
            if isinstance(size, torch.SymInt):
                method, where = ("numel", ()) if dim is None else ("size", (dim,))
                number = graph.call_method(method, (table, *where))
                number.meta.update(meta, example_value=size)
            # Names of tables would make equal layers of a model differ.
            name = self._made_of(self._before(index))
            arguments = (index, number, use.negative, use.ignored, _unnamed(dim), name)
            checked = graph.call_function(CHECKED_INDEX, arguments)
            checked.meta.update(meta, example_value=value)
        kept = node.args[:1] if table is index else ()  # `ids[ids] = 0` writes into ids
        rest = node.args[len(kept) :], node.kwargs
        args, kwargs = fx.map_arg(rest, lambda item: checked if item is index else item)
        node.args, node.kwargs = (*kept, *args), kwargs

    def _before(self, index: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        left = [index]
        while left:
            node = left.pop()
            if node in self._of_call and node not in found:
                found.add(node)
                left += node.all_input_nodes
        return found

    def _made_of(self, nodes: Collection[fx.Node]) -> str:
        inputs = [node for node in nodes if node in self._items]
        names = [_name(self._items[n]) for n in inputs if isinstance(_value(n), Tensor)]
        return f"the index {{}} that the model makes of {some(names) or 'the sizes of this call'}"

    def _is_of_call(self, node: fx.Node) -> bool:
        return node in self._of_call or _root(node) in self._filled

    def _add(self, use: _Use, index: fx.Node, size: _Size, way: list[fx.Node]) -> None:
        known: Any = self._known.__getitem__
        for node in way:
            if node not in self._known:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known)
                target: Any = node.target
                self._known[node] = self._step(target, args, kwargs)
        item = self._items.get(use.table)
        table = _unnamed(use.dim) if item is None else _name(item)
        if index in self._items:
            name = f"{_name(self._items[index])}{{}}"
        else:
            name = self._made_of(dict.fromkeys(n for step in way for n in step.all_input_nodes))
        entries: Any = size
        if isinstance(size, tuple):
            source, dim = size
            entries = self._known[source]
            entries = entries if dim is None else self._step("size", (entries, dim), {})
        looked_up = self._known[index], entries, use.negative, use.ignored, table, name
        self._step(refuse_outside, looked_up, {})

    def _step(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        self._steps.append(LookupStep(function, args, kwargs))
        return Value(len(self._items) + len(self._steps) - 1)

    def _size(self, use: _Use) -> _Size | None:
        size = _entries(_value(use.table), use.dim)
        if not isinstance(size, torch.SymInt):
            return size
        if use.table in self._items and use.dim is not None:
            return use.table, use.dim
        wanted = size_expression(size)
        for node in self._items:
            value = _value(node)
            if isinstance(value, torch.SymInt) and size_expression(value) == wanted:
                return node, None
            for dim, length in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(length, torch.SymInt) and size_expression(length) == wanted:
                    return node, dim
        return None

    def _way(self, index: fx.Node, user: fx.Node) -> list[fx.Node] | None:
        """The nodes that compute the index, in order; None if impure or independent of the call."""
        found: set[fx.Node] = set()
        left, of_call = [index], False
        while left:
            node = left.pop()
            if node in found:
                continue
            found.add(node)
            if len(found) > _LONGEST or node in self._mapped or not _is_small(node):
                return None
            item = self._items.get(node)
            if item is None:
                if not _is_pure(node):
                    return None
            elif item.kind == "state":
                value = _value(node)
                if isinstance(value, Tensor) and value.dim() and not _counts(value):
                    return None
            elif item.kind in _OF_CALL:
                of_call = True
            else:
                return None
            left += node.all_input_nodes
        steps = sorted(node for node in found if node not in self._items)
        first = self._first_writes
        writes = [first[root] for root in map(_root, found) if root in first]
        written = any(write < step for write in writes for step in steps)
        if _root(index) in first:  # `index` may be a view of it
            written |= first[_root(index)] < user
        return steps if of_call and not written else None


def _uses(node: fx.Node) -> Iterator[_Use]:
    target, args, kwargs = node.target, node.args, node.kwargs
    name = _called(node)

    def argument(place: int, name: str) -> Any:
        return args[place] if len(args) > place else kwargs.get(name)

    if target is functional.embedding:
        yield from _use(argument(0, "input"), argument(1, "weight"), 0)
    elif target is torch.embedding:
        yield from _use(argument(1, "indices"), argument(0, "weight"), 0)
    elif target in (functional.cross_entropy, functional.nll_loss):
        logits, ignored = _value(argument(0, "input")), argument(4, "ignore_index")
        if isinstance(logits, Tensor) and isinstance(ignored, (int, type(None))):
            number = -100 if ignored is None else ignored
            dim = 0 if logits.dim() == 1 else 1
            yield from _use(argument(1, "target"), argument(0, "input"), dim, ignored=number)
    elif target in (operator.getitem, operator.setitem):
        yield from _subscripts(args[0], args[1])
    elif name in _BY_DIM:
        dim = argument(1, "dim")
        if isinstance(dim, int):
            negative = name.startswith("index_fill")
            yield from _use(argument(2, "index"), argument(0, "input"), dim, negative=negative)
    elif name == "take_along_dim":
        yield from _use(argument(1, "indices"), argument(0, "input"), argument(2, "dim"))
    elif name in ("take", "put", "put_"):
        yield from _use(argument(1, "index"), argument(0, "input"), None, negative=True)
    elif name in ("index_put", "index_put_"):
        yield from _subscripts(argument(0, "input"), tuple(argument(1, "indices")))


def _use(
    index: Any, table: Any, dim: int | None, *, negative: bool = False, ignored: int | None = None
) -> Iterator[_Use]:
    if isinstance(index, fx.Node) and isinstance(table, fx.Node):
        yield _Use(index, table, dim, negative, ignored)


def _is_place(node: fx.Node) -> bool:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return bool(node.args[1] == 1) and _called(node.args[0]) in _FOUND_BESIDE
    return _called(node) in _FOUND


def _called(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _subscripts(table: Any, subscript: Any) -> Iterator[_Use]:
    items = subscript if isinstance(subscript, tuple) else (subscript,)
    sizes = [_dims(item) for item in items]
    dim = 0
    for place, item in enumerate(items):
        value = _value(item)
        if item is Ellipsis:
            whole = _value(table)
            if not isinstance(whole, Tensor):
                return
            dim = whole.dim() - sum(sizes[place + 1 :])
        elif isinstance(value, Tensor) and _counts(value):
            yield from _use(item, table, dim, negative=True)
        dim += sizes[place]


def _dims(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    value = _value(item)
    return value.dim() if isinstance(value, Tensor) and value.dtype == torch.bool else 1


def _entries(table: Tensor, dim: int | None) -> int | torch.SymInt:
    return table.numel() if dim is None else table.shape[dim]


def _unnamed(dim: int | None) -> str:
    return f"the {'tensor' if dim is None else f'dimension {dim}'} that it points into"


def _value(item: Any) -> Any:
    return item.meta.get("example_value") if isinstance(item, fx.Node) else None


def _counts(value: Tensor) -> bool:
    dtype = value.dtype
    whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return whole and value.device.type == "cpu"


def _same_numbers(node: fx.Node) -> fx.Node:
    """The source of `node`'s numbers before they were laid out anew."""
    while node.op == "call_method" and node.target in _SAME:
        before = node.args[0]
        value = _value(before)
        if not (isinstance(before, fx.Node) and isinstance(value, Tensor) and _counts(value)):
            break
        node = before
    return node


def _is_small(node: fx.Node) -> bool:
    """Whether a value is about as small as a call's arguments: no dimension twice."""
    value = _value(node)
    if isinstance(value, (tuple, list)):
        return all(not isinstance(item, Tensor) for item in value)
    if not isinstance(value, Tensor):
        return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
    if value.device.type != "cpu":
        return False
    sizes = [size_expression(size) for size in value.shape if isinstance(size, torch.SymInt)]
    if len(set(sizes)) < len(sizes):
        return False
    fixed = 1
    for size in value.shape:
        fixed *= 1 if isinstance(size, torch.SymInt) else size
    return fixed <= _NUMBERS


def _is_pure(node: fx.Node) -> bool:
    if _written(node) or node.target in _BY_CHANCE:
        return False
    if node.op == "call_method":
        return True
    target: Any = node.target
    if not callable(target) or isinstance(target, OperatorBase):
        return False
    if target in _FACTORIES or any(isinstance(_value(n), Tensor) for n in node.all_input_nodes):
        home = getattr(target, "__module__", None) or ""
        return home.partition(".")[0] in ("", "torch", "_operator", "math", "builtins")
    return not isinstance(_value(node), Tensor)


_IN_PLACE = frozenset(
    (
        *(operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imod),
        *(operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub),
        *(operator.itruediv, operator.ixor, operator.imatmul, operator.setitem),
    )
)


def _written(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node may write into: by schema, in-place name, `out=` or `inplace=True`."""
    if node.op not in ("call_function", "call_method"):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return node.all_input_nodes if schema.is_mutable else []
    outs = node.kwargs.get("out")
    written = list(outs) if isinstance(outs, (list, tuple)) else [outs]
    name = _called(node)
    in_place = name.endswith("_") and not name.endswith("__")
    in_place &= getattr(node.target, "__module__", "") != "_operator"  # and_, or_, not_
    if node.args and (in_place or node.target in _IN_PLACE or node.kwargs.get("inplace")):
        written.append(node.args[0])
    return [item for item in written if isinstance(item, fx.Node)]


def _root(item: Any) -> Any:
    """The base tensor of a chain of possible views."""
    while isinstance(item, fx.Node) and item.op != "placeholder" and item.args:
        if not isinstance(item.args[0], fx.Node) or not _may_share(item, item.args[0]):
            break
        item = item.args[0]
    return item


def _may_share(node: fx.Node, other: fx.Node) -> bool:
    a, b = _value(node), _value(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    return storage_key(a) == storage_key(b)


def _name(item: FrameInput) -> str:
    return item.label if item.role is None else item.role.argument
