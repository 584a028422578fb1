"""Lets AOTAutograd trace repeated layers once; the graph is the same as if it had traced all.

    from Dynamo     h1 = layer(h0; W0); h2 = layer(h1; W1); h3 = layer(h2; W2)
    traced          x = stamp(h0, W0); h1 = stamp(layer(x)); h2 = stamp(h1, W1); ...
    afterwards      each stamp is replaced by a copy of the traced layer on the stamp's operands

Layers are module calls of equal canonical form (lorafx.passes.outline). Values that they write into
inputs of the graph, such as a cache, become results that are copied into the input afterwards:

    lorafx::stamp(values, key)          new tensors with the layouts registered under `key`
    lorafx::overwrite(written, value)   replaces the contents of `written` by `value`, of its layout

A stamp never runs. In the traced graph an overwritten tensor is the value itself: Tensor.copy_
expands and compares symbolic sizes, which takes 4 ms of tracing per call.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from lorafx.errors import CaptureError
from lorafx.kernels.ops.op_library import define, define_on
from lorafx.model.module_graph import storage_key
from lorafx.ownership.real import written
from lorafx.passes.outline.isomorphism import Stretch
from lorafx.passes.outline.outline import is_pure, is_view, repeats
from lorafx.program.frame import fake_value
from lorafx.torch_internals import graph_parts
from lorafx.torch_internals.dynamo import _log_api_usage_once
from lorafx.torch_internals.graph_parts import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    _DisableTorchDispatch,
    enable_python_dispatcher,
    in_kernel_invocation_manager,
    tree_leaves,
)
from lorafx.torch_internals.shortcuts import gave_up


class Layout(NamedTuple):
    shape: tuple[int | torch.SymInt, ...]
    strides: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Layout:
        return cls(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)

    def empty(self, mode: FakeTensorMode) -> FakeTensor:
        with _DisableTorchDispatch():
            # Allocating a symbolic size takes twenty times as long, all of it arithmetic on
            # symbols; only the identity of this memory matters.
            storage = torch.empty(0, dtype=self.dtype, device="meta")
            meta = storage.as_strided(self.shape, self.strides)
        return FakeTensor(mode, meta, self.device)

    def view_of(self, other: FakeTensor, offset: int | torch.SymInt) -> FakeTensor:
        """A fake tensor of this layout in the memory of `other`, beginning at element `offset`."""
        mode = other.fake_mode
        with in_kernel_invocation_manager(mode):
            meta = other.as_strided(self.shape, self.strides, offset + other.storage_offset())
        return FakeTensor(mode, meta, self.device)


def without_data(value: Any) -> FakeTensor:
    """A fake tensor laid out like `value` in new memory, made without symbolic arithmetic."""
    return Layout.of(value).empty(value.fake_mode)


#: The layouts of the results of each stamp of the running capture, by key.
LAYOUTS: dict[int, Sequence[Layout]] = {}


def stamp(values: Sequence[Tensor], key: int) -> list[Tensor]:
    raise CaptureError("lorafx::stamp stands for a layer during tracing and cannot be executed")


def stamp_fake(values: Sequence[Tensor], key: int) -> Sequence[Tensor]:
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    return [layout.empty(mode) for layout in LAYOUTS[key]]


define("stamp(Tensor[] values, int key) -> Tensor[]", stamp, stamp_fake)


def overwrite(written: Tensor, value: Tensor) -> None:
    written.copy_(value)


def overwrite_fake(written: Tensor, value: Tensor) -> None:
    pass


def overwrite_functional(written: Tensor, value: Tensor) -> None:
    """The functionalization rule of `overwrite`; both arguments are functional wrappers."""
    graph_parts._sync(value)
    graph_parts._functionalize_replace(written, graph_parts._from_functional_tensor(value))
    graph_parts._functionalize_commit_update(written)
    graph_parts._functionalize_sync(written)


define("overwrite(Tensor(a!) written, Tensor value) -> ()", overwrite, overwrite_fake)
define_on("Functionalize", "overwrite", overwrite_functional)


STAMP = torch.ops.lorafx.stamp.default
OVERWRITE = torch.ops.lorafx.overwrite.default
#: Calls that have neither a value nor an effect on a graph.
_INERT = frozenset({_log_api_usage_once})
#: The least number of calls in a layer for which stamping saves time.
MIN_CALLS = 8

T = TypeVar("T")


class NotUnfolded(CaptureError):
    """The stamps cannot be removed from the traced graph, so it is traced again without any."""


@dataclass(frozen=True)
class _Kind:
    """Equal layers: keys of the stamps before and behind the first one, and of each other layer's
    stamp, with its module stacks by those of the first."""

    enter: int
    leave: int
    others: dict[int, dict[tuple[Any, ...], Any]]


@dataclass
class Folded:
    """A copy of Dynamo's graph in which stamps stand for layers."""

    module: fx.GraphModule
    kinds: list[_Kind] = field(default_factory=list)

    def forget(self) -> None:
        for kind in self.kinds:
            for key in (kind.enter, kind.leave, *kind.others):
                LAYOUTS.pop(key, None)


def traced_once(
    gm: fx.GraphModule, trace: Callable[[fx.GraphModule, Folded | None], T], title: str
) -> T:
    """Call `trace` with the folded graph, which it must `unfold`, or else with the original."""
    folded = fold(gm)
    if folded is None:
        return trace(gm, None)
    try:
        return trace(folded.module, folded)
    except NotUnfolded as error:
        gave_up("stamps", f"{title}: {error}")
    finally:
        folded.forget()
    return trace(gm, None)


def fold(gm: fx.GraphModule) -> Folded | None:
    """A copy of Dynamo's graph with stamps for repeated layers; None if no layers repeat."""
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        return None
    folded = Folded(_copy_of(gm))
    try:
        _fold(folded, mode)
    except Exception:  # the graph is traced without stamps
        folded.forget()
        return None
    if not folded.kinds:
        return None
    folded.module.recompile()
    return folded


def _copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        copies[node] = new_node = graph.node_copy(node, copies.__getitem__)
        for name in vars(node).keys() - vars(new_node).keys():  # Dynamo's notes on inputs
            setattr(new_node, name, getattr(node, name))
    module = fx.GraphModule(gm, graph)
    module.meta = dict(gm.meta)
    vars(module).update({key: item for key, item in vars(gm).items() if key not in vars(module)})
    return module


def _fold(folded: Folded, mode: FakeTensorMode) -> None:
    gm = folded.module
    nodes = list(gm.graph.nodes)
    for node in nodes:
        node.meta["val"] = node.meta.get("example_value")
    places = {node: place for place, node in enumerate(nodes)}
    switches = [places[node] for node in nodes if _may_change_tracing(node)]
    claimed: set[fx.Node] = set()
    replaced: dict[fx.Node, fx.Node] = {}
    for regions, stretches in repeats(gm, claimed, MIN_CALLS):
        begin, end = places[stretches[0].nodes[0]], places[stretches[-1].nodes[-1]]
        if any(begin < place < end for place in switches):
            continue  # later equal calls may be traced differently
        layers = _layers_of(stretches, replaced)
        stacks = [_matching_stacks(stretches[0], stretch) for stretch in stretches[1:]]
        effects = None if None in stacks else _effects_of(layers, mode)
        if effects is not None:
            folded.kinds.append(_stamp_layers(gm.graph, layers, stacks, effects, replaced))
            claimed.update(node for region in regions for node in region.nodes)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def _may_change_tracing(node: fx.Node) -> bool:
    """Whether a call without tensors, such as entering autocast, may change how tracing goes on."""
    if not node.op.startswith("call_") or fake_value(node) is not None or node.target in _INERT:
        return False
    return not any(isinstance(fake_value(source), Tensor) for source in node.all_input_nodes)


def _matching_stacks(first: Stretch, other: Stretch) -> dict[tuple[Any, ...], Any] | None:
    """The module stacks of `other` by those of `first`; None where they do not correspond."""
    stacks: dict[tuple[Any, ...], Any] = {}
    for node, twin in zip(first.nodes, other.nodes, strict=True):
        stack = twin.meta.get("nn_module_stack") or {}
        known = stacks.setdefault(tuple(node.meta.get("nn_module_stack") or ()), stack)
        if tuple(known) != tuple(stack):
            return None
    return stacks


# --- operands, results and writes of layers ---


@dataclass(frozen=True)
class _Layer:
    """A layer: its nodes, tensor operands, results that are read behind it, and operand sizes."""

    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Effects:
    """Numbers of the operands that layers write into, and of those that are results, by result."""

    written: tuple[int, ...]
    passed: Mapping[int, int]

    def new_results(self, layer: _Layer) -> list[fx.Node]:
        return [node for at, node in enumerate(layer.results) if at not in self.passed]


def _layers_of(stretches: Sequence[Stretch], replaced: Mapping[fx.Node, fx.Node]) -> list[_Layer]:
    """The layers of a kind, all with the same results. `replaced`: results of stamped layers."""
    read = set()
    for stretch in stretches:
        inside = set(stretch.nodes)
        for place, node in enumerate(stretch.nodes):
            if any(user not in inside for user in node.users):
                read.add(place)
    layers = []
    for stretch in stretches:
        sizes = tuple(node for node in stretch.operands if _is_size(fake_value(node)))
        operands = tuple(replaced.get(n, n) for n in stretch.operands if n not in sizes)
        results = tuple(stretch.nodes[place] for place in sorted(read))
        layers.append(_Layer(stretch.nodes, operands, results, sizes))
    return layers


def _is_size(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.layout is torch.strided


class _Writes(TorchDispatchMode):
    """Records the memory that operators write, or all memory that one without a schema is given."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        has_schema = hasattr(func, "_schema")
        leaves = written(func, args, kwargs) if has_schema else tree_leaves((args, kwargs))
        self.memory |= {storage_key(item) for item in leaves if isinstance(item, Tensor)}
        return func(*args, **kwargs)


def _effects_of(layers: Sequence[_Layer], mode: FakeTensorMode) -> _Effects | None:
    """The layers' effects, found on fake tensors; None where a stamp cannot express them."""
    layer = layers[0]
    values = [fake_value(node) for node in (*layer.operands, *layer.results)]
    if not all(map(_is_plain, values)):
        return None
    computed: dict[fx.Node, Any] = {node: fake_value(node) for node in layer.sizes}
    # With symbolic sizes, composite operators such as matmul need their decompositions.
    with enable_python_dispatcher(), mode, torch.inference_mode(False), torch.no_grad():
        computed.update((node, without_data(fake_value(node))) for node in layer.operands)
        with _Writes() as writes:
            for node in layer.nodes:
                if node.op not in ("call_function", "call_method"):
                    return None  # a constant, or the graph of a branch
                args, kwargs = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
                target: Any = node.target
                if node.op == "call_method":
                    target, args = getattr(args[0], target), args[1:]
                computed[node] = target(*args, **kwargs)
    operands = {id(computed[node]): place for place, node in enumerate(layer.operands)}
    results = [computed[node] for node in layer.results]
    passed = {at: operands[id(r)] for at, r in enumerate(results) if id(r) in operands}
    inputs = [storage_key(computed[node]) for node in layer.operands]
    outputs = [storage_key(result) for at, result in enumerate(results) if at not in passed]
    if not outputs or len({*inputs, *outputs}) != len(inputs) + len(outputs):
        return None
    changed = tuple(place for place, memory in enumerate(inputs) if memory in writes.memory)
    apart = all(_are_unshared_inputs(layer, changed) for layer in layers)
    return _Effects(changed, passed) if apart else None


def _are_unshared_inputs(layer: _Layer, places: Sequence[int]) -> bool:
    """Whether these operands are graph inputs whose memory no other operand shares."""
    memory = [storage_key(fake_value(node)) for node in layer.operands]
    return all(
        layer.operands[place].op == "placeholder" and memory.count(memory[place]) == 1
        for place in places
    )


# --- stamps for layers ---


def _stamp_layers(
    graph: fx.Graph,
    layers: Sequence[_Layer],
    stacks: Sequence[Any],
    effects: _Effects,
    replaced: dict[fx.Node, fx.Node],
) -> _Kind:
    first, *others = layers
    with graph.inserting_before(first.nodes[0]):
        stamped, enter = _call_stamp(graph, first.operands, first.operands)
    operands = dict(zip(first.operands, stamped, strict=True))
    for node in first.nodes:
        for source, operand in operands.items():
            node.replace_input_with(source, operand)
    with graph.inserting_before(first.nodes[-1].next):
        overwritten = [operands[first.operands[place]] for place in effects.written]
        values = [*effects.new_results(first), *overwritten]
        leave = _insert_stamp(graph, first, values, effects, replaced)
    keys: dict[int, dict[tuple[Any, ...], Any]] = {}
    for layer, stack in zip(others, stacks, strict=True):
        # The previous layers may have been stamped just now.
        layer = replace(layer, operands=tuple(replaced.get(node, node) for node in layer.operands))
        with graph.inserting_before(layer.nodes[0]):
            key = _insert_stamp(graph, layer, layer.operands, effects, replaced)
        keys[key] = stack
        for node in reversed(layer.nodes):
            graph.erase_node(node)
    return _Kind(enter, leave, keys)


def _insert_stamp(
    graph: fx.Graph,
    layer: _Layer,
    values: Sequence[fx.Node],
    effects: _Effects,
    replaced: dict[fx.Node, fx.Node],
) -> int:
    """Insert a stamp of `values` that returns the layer's new tensors and written operands, copy
    these back, redirect the layer's readers to the stamp, and return its key."""
    overwritten = [layer.operands[place] for place in effects.written]
    new = effects.new_results(layer)
    stamped, key = _call_stamp(graph, values, [*new, *overwritten])
    for node, item in zip(overwritten, stamped[len(new) :], strict=True):
        graph.call_function(OVERWRITE, (node, item))
    passed = {layer.results[at]: layer.operands[place] for at, place in effects.passed.items()}
    inside = {*layer.nodes, *(item.args[0] for item in stamped)}
    for node, item in {**dict(zip(new, stamped, strict=False)), **passed}.items():
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
        replaced[node] = item
    return key


def _call_stamp(
    graph: fx.Graph, values: Sequence[fx.Node], like: Sequence[fx.Node]
) -> tuple[list[fx.Node], int]:
    # torch's caches hash such constants, so they are equal in every process.
    key = next(number for number in itertools.count(1) if number not in LAYOUTS)
    LAYOUTS[key] = [Layout.of(fake_value(node)) for node in like]
    call = graph.call_function(STAMP, (list(values), key))
    items = []
    with graph.inserting_after(call):
        for index in reversed(range(len(like))):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta["example_value"] = item.meta["val"] = fake_value(like[index])
            items.append(item)
    return items[::-1], key


# --- layers for stamps ---


def unfold(graph: fx.Graph, folded: Folded) -> None:
    """Replace the stamps in AOTAutograd's graph in place. It is unusable after NotUnfolded."""
    stamps = {node.args[1]: node for node in graph.nodes if node.target is STAMP}
    values = [fake_value(node) for node in graph.nodes]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    for kind in folded.kinds:
        enter, leave = stamps.get(kind.enter), stamps.get(kind.leave)
        if mode is None or enter is None or leave is None:
            raise NotUnfolded("a layer that stands for others is not in the traced graph")
        body = _body(enter, leave)
        order = {node: index for index, node in enumerate(graph.nodes)}
        for key, stacks in kind.others.items():
            call = stamps.get(key)
            if call is None:
                continue  # the layer's results are unread
            if order[call] < order[leave]:
                raise NotUnfolded("layers were traced in another order")
            with graph.inserting_before(call), mode:
                _copy_body(graph, body, enter, leave, call, stacks)
        _replace_by_values(graph, leave, leave.args[0])
        _replace_by_values(graph, enter, enter.args[0])
    if any(node.target is STAMP for node in graph.nodes):
        raise NotUnfolded("a stamp is left in the traced graph")
    graph.lint()


def _body(enter: fx.Node, leave: fx.Node) -> list[fx.Node]:
    """The nodes that compute the layer, in order, with constants but without outer sizes."""
    items = list(enter.users)
    if any(item.target is not operator.getitem for item in items):
        raise NotUnfolded("the operands of a layer are read as a list")
    between: list[fx.Node] = []
    node = enter.next
    while node is not leave:
        if node.op == "output":
            raise NotUnfolded("the stamp behind a layer is missing")
        between.append(node)
        node = node.next
    inside = set(items)
    for node in between:
        if not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    for node in inside:
        if any(user not in inside and user is not leave for user in node.users):
            raise NotUnfolded(f"{node.name} is read outside of its layer")
    pending = [*inside.difference(items)]
    seen: set[fx.Node] = set(items)
    while pending:
        node = pending.pop()
        if node in seen or (node not in inside and _is_size(fake_value(node))):
            continue
        seen.add(node)
        if node.op != "call_function" or node.target is STAMP or not is_pure(node):
            raise NotUnfolded(f"{node.name} is not a function of the operands of a layer")
        pending.extend(node.all_input_nodes)
    return [node for node in between if node in seen and node not in items]


def _copy_body(
    graph: fx.Graph,
    body: Sequence[fx.Node],
    enter: fx.Node,
    leave: fx.Node,
    call: fx.Node,
    stacks: dict[tuple[Any, ...], Any],
) -> None:
    operands: Any = call.args[0]
    copies: dict[fx.Node, fx.Node] = {item: operands[item.args[1]] for item in enter.users}
    for node in body:
        copy = graph.node_copy(node, lambda source: copies.get(source, source))
        copy.meta["val"] = _value_of_copy(node, copy)
        stack = tuple(node.meta.get("nn_module_stack") or ())
        if stack:
            if stack not in stacks:
                raise NotUnfolded(f"{node.name} was made in a module that no layer calls")
            copy.meta["nn_module_stack"] = stacks[stack]
        copies[node] = copy
    results: Any = leave.args[0]
    _replace_by_values(graph, call, [copies.get(item, item) for item in results])


def _value_of_copy(node: fx.Node, copy: fx.Node) -> Any:
    value = fake_value(node)
    if is_view(node):
        base, other = (fake_value(item.all_input_nodes[0]) for item in (node, copy))
        plain = all(map(_is_plain, (value, base, other))) and value.dtype == base.dtype
        lazy = plain and (value.is_conj() or value.is_neg())
        if plain and not lazy and storage_key(value) == storage_key(base):
            offset = value.storage_offset() - base.storage_offset()
            return Layout.of(value).view_of(other, offset)
    elif isinstance(value, FakeTensor):
        return without_data(value)
    elif isinstance(value, (list, tuple)) and value and all(map(_is_plain, value)):
        apart = len({*map(storage_key, value)}) == len(value)
        if apart:
            return value.__class__(map(without_data, value))
    args, kwargs = fx.map_arg((copy.args, copy.kwargs), fake_value)
    return copy.target(*args, **kwargs)  # type: ignore[operator]


def _replace_by_values(graph: fx.Graph, call: fx.Node, values: Any) -> None:
    for item in list(call.users):
        item.replace_all_uses_with(values[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(call)
