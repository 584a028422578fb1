"""AOTAutograd traces repeated layers once; the resulting graph is the same as if it traced all.

    of Dynamo's     h1 = layer(h0; W0); h2 = layer(h1; W1); h3 = layer(h2; W2)
    traced          x = stamp(h0, W0); h1 = stamp(layer(x)); h2 = stamp(h1, W1); ...
    afterwards      every stamp is the traced layer again, on its operands

Layers are module calls of equal canonical form (lorafx.passes.outline). Values that they write into
inputs of the graph, such as a cache, are results, copied into the input afterwards:

    lorafx::stamp(values, key)          new tensors of the layouts that are noted for `key`
    lorafx::overwrite(written, value)   written becomes value, which is laid out like it

A stamp never runs. In the traced graph an overwritten tensor is the value itself: Tensor.copy_
expands and compares symbolic sizes, 4 ms of tracing each.
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
            nothing = torch.empty(0, dtype=self.dtype, device="meta")
            meta = nothing.as_strided(self.shape, self.strides)
        return FakeTensor(mode, meta, self.device)

    def view_of(self, other: FakeTensor, offset: int | torch.SymInt) -> FakeTensor:
        """A fake tensor of this layout in the memory of `other`, from its element `offset` on."""
        mode = other.fake_mode
        with in_kernel_invocation_manager(mode):
            meta = other.as_strided(self.shape, self.strides, offset + other.storage_offset())
        return FakeTensor(mode, meta, self.device)


def without_data(value: Any) -> FakeTensor:
    """A tensor laid out like `value`, in new memory, without costly symbolic arithmetic."""
    return Layout.of(value).empty(value.fake_mode)


#: Results of the ops of the running capture, by key.
LAYOUTS: dict[int, Sequence[Layout]] = {}


def stamp(values: Sequence[Tensor], key: int) -> list[Tensor]:
    raise CaptureError("lorafx::stamp stands for a layer while it is traced, and computes nothing")


def stamp_fake(values: Sequence[Tensor], key: int) -> Sequence[Tensor]:
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    return [layout.empty(mode) for layout in LAYOUTS[key]]


define("stamp(Tensor[] values, int key) -> Tensor[]", stamp, stamp_fake)


def overwrite(written: Tensor, value: Tensor) -> None:
    written.copy_(value)


def overwrite_fake(written: Tensor, value: Tensor) -> None:
    pass


def overwrite_functional(written: Tensor, value: Tensor) -> None:
    """Functionalization of an operator that writes; both arguments are its wrappers."""
    graph_parts._sync(value)
    graph_parts._functionalize_replace(written, graph_parts._from_functional_tensor(value))
    graph_parts._functionalize_commit_update(written)
    graph_parts._functionalize_sync(written)


define("overwrite(Tensor(a!) written, Tensor value) -> ()", overwrite, overwrite_fake)
define_on("Functionalize", "overwrite", overwrite_functional)


STAMP = torch.ops.lorafx.stamp.default
OVERWRITE = torch.ops.lorafx.overwrite.default
#: Calls without value or effect on a graph.
_INERT = frozenset({_log_api_usage_once})
#: In shorter layers (calls of Dynamo's graph), stamping saves no time.
LEAST = 8

T = TypeVar("T")


class NotUnfolded(CaptureError):
    """The stamps cannot be taken out of the traced graph; it is traced without any."""


@dataclass(frozen=True)
class _Kind:
    """Equal layers: keys of the ops around the first layer, and of each other layer, with its
    module calls by those of the first."""

    enter: int
    leave: int
    others: dict[int, dict[tuple[Any, ...], Any]]


@dataclass
class Folded:
    """A copy of Dynamo's graph with stamps for layers."""

    module: fx.GraphModule
    kinds: list[_Kind] = field(default_factory=list)

    def forget(self) -> None:
        for kind in self.kinds:
            for key in (kind.enter, kind.leave, *kind.others):
                LAYOUTS.pop(key, None)


def traced_once(
    gm: fx.GraphModule, trace: Callable[[fx.GraphModule, Folded | None], T], title: str
) -> T:
    """`trace` of the folded graph, which it must `unfold`; if that fails, of the original."""
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
    """A copy of Dynamo's graph with stamps for repeated layers, if there are any."""
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        return None
    folded = Folded(_copied(gm))
    try:
        _fold(folded, mode)
    except Exception:  # the graph is traced without stamps
        folded.forget()
        return None
    if not folded.kinds:
        return None
    folded.module.recompile()
    return folded


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        made[node] = copy = graph.node_copy(node, made.__getitem__)
        for key in vars(node).keys() - vars(copy).keys():  # Dynamo's notes on inputs
            setattr(copy, key, getattr(node, key))
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
    switches = [places[node] for node in nodes if _switches(node)]
    claimed: set[fx.Node] = set()
    replaced: dict[fx.Node, fx.Node] = {}
    for regions, stretches in repeats(gm, claimed, LEAST):
        begin, end = places[stretches[0].nodes[0]], places[stretches[-1].nodes[-1]]
        if any(begin < place < end for place in switches):
            continue  # later equal calls may be traced differently
        layers = _layers_of(stretches, replaced)
        stacks = [_calls(stretches[0], stretch) for stretch in stretches[1:]]
        effects = None if None in stacks else _effects_of(layers, mode)
        if effects is not None:
            folded.kinds.append(_stamp(gm.graph, layers, stacks, effects, replaced))
            claimed.update(node for region in regions for node in region.nodes)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def _switches(node: fx.Node) -> bool:
    """Whether a call, without operands and value, may change later tracing (autocast)."""
    if not node.op.startswith("call_") or fake_value(node) is not None or node.target in _INERT:
        return False
    return not any(isinstance(fake_value(source), Tensor) for source in node.all_input_nodes)


def _calls(first: Stretch, other: Stretch) -> dict[tuple[Any, ...], Any] | None:
    """The other layer's module calls by the first's, or None where they do not correspond."""
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
    """The nodes of a layer, its tensor operands, and the values read behind it."""

    nodes: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Effects:
    """Effects of layers beside new tensors: operands `written`, operands `passed` as results."""

    written: tuple[int, ...]
    passed: Mapping[int, int]

    def made_by(self, layer: _Layer) -> list[fx.Node]:
        return [node for at, node in enumerate(layer.returned) if at not in self.passed]


def _layers_of(stretches: Sequence[Stretch], replaced: Mapping[fx.Node, fx.Node]) -> list[_Layer]:
    """The layers of a kind, with common results. `replaced`: results of stamped layers."""
    read = set()
    for stretch in stretches:
        inside = set(stretch.nodes)
        for place, node in enumerate(stretch.nodes):
            if any(user not in inside for user in node.users):
                read.add(place)
    found = []
    for stretch in stretches:
        sizes = tuple(node for node in stretch.operands if _is_size(fake_value(node)))
        taken = tuple(replaced.get(n, n) for n in stretch.operands if n not in sizes)
        returned = tuple(stretch.nodes[place] for place in sorted(read))
        found.append(_Layer(stretch.nodes, taken, returned, sizes))
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.layout is torch.strided


class _Writes(TorchDispatchMode):
    """Notes memory that operators write, or may write without saying so in their schema."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        told = hasattr(func, "_schema")
        leaves = written(func, args, kwargs) if told else tree_leaves((args, kwargs))
        self.memory |= {storage_key(item) for item in leaves if isinstance(item, Tensor)}
        return func(*args, **kwargs)


def _effects_of(layers: Sequence[_Layer], mode: FakeTensorMode) -> _Effects | None:
    """The layers' effects, found on fake tensors; None where a stamp cannot express them."""
    layer = layers[0]
    values = [fake_value(node) for node in (*layer.taken, *layer.returned)]
    if not all(map(_is_plain, values)):
        return None
    made: dict[fx.Node, Any] = {node: fake_value(node) for node in layer.sizes}
    # With symbolic sizes, composite operators such as matmul need their decompositions.
    with enable_python_dispatcher(), mode, torch.inference_mode(False), torch.no_grad():
        made.update((node, without_data(fake_value(node))) for node in layer.taken)
        with _Writes() as writes:
            for node in layer.nodes:
                if node.op not in ("call_function", "call_method"):
                    return None  # a constant, or the graph of a branch
                args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
                target: Any = node.target
                if node.op == "call_method":
                    target, args = getattr(args[0], target), args[1:]
                made[node] = target(*args, **kwargs)
    operands = {id(made[node]): place for place, node in enumerate(layer.taken)}
    results = [made[node] for node in layer.returned]
    passed = {at: operands[id(r)] for at, r in enumerate(results) if id(r) in operands}
    given = [storage_key(made[node]) for node in layer.taken]
    new = [storage_key(result) for at, result in enumerate(results) if at not in passed]
    if not new or len({*given, *new}) != len(given) + len(new):
        return None
    changed = tuple(place for place, memory in enumerate(given) if memory in writes.memory)
    apart = all(_are_apart(layer, changed) for layer in layers)
    return _Effects(changed, passed) if apart else None


def _are_apart(layer: _Layer, places: Sequence[int]) -> bool:
    """Whether these operands are graph inputs in unshared memory, to be written later."""
    memory = [storage_key(fake_value(node)) for node in layer.taken]
    return all(
        layer.taken[place].op == "placeholder" and memory.count(memory[place]) == 1
        for place in places
    )


# --- stamps for layers ---


def _stamp(
    graph: fx.Graph,
    layers: Sequence[_Layer],
    stacks: Sequence[Any],
    effects: _Effects,
    replaced: dict[fx.Node, fx.Node],
) -> _Kind:
    first, *others = layers
    with graph.inserting_before(first.nodes[0]):
        given, enter = _note(graph, first.taken, first.taken)
    inside = dict(zip(first.taken, given, strict=True))
    for node in first.nodes:
        for source, item in inside.items():
            node.replace_input_with(source, item)
    with graph.inserting_before(first.nodes[-1].next):
        changed = [inside[first.taken[place]] for place in effects.written]
        leave = _finish(graph, first, [*effects.made_by(first), *changed], effects, replaced)
    keys: dict[int, dict[tuple[Any, ...], Any]] = {}
    for layer, stack in zip(others, stacks, strict=True):
        # The previous layers may have been stamped just now.
        layer = replace(layer, taken=tuple(replaced.get(node, node) for node in layer.taken))
        with graph.inserting_before(layer.nodes[0]):
            key = _finish(graph, layer, layer.taken, effects, replaced)
        keys[key] = stack
        for node in reversed(layer.nodes):
            graph.erase_node(node)
    return _Kind(enter, leave, keys)


def _finish(
    graph: fx.Graph,
    layer: _Layer,
    values: Sequence[fx.Node],
    effects: _Effects,
    replaced: dict[fx.Node, fx.Node],
) -> int:
    """A stamp of `values` that returns the layer's new tensors and its written operands, which are
    copied back; readers of the layer are redirected."""
    changed = [layer.taken[place] for place in effects.written]
    made = effects.made_by(layer)
    given, key = _note(graph, values, [*made, *changed])
    for node, item in zip(changed, given[len(made) :], strict=True):
        graph.call_function(OVERWRITE, (node, item))
    passed = {layer.returned[at]: layer.taken[place] for at, place in effects.passed.items()}
    inside = {*layer.nodes, *(item.args[0] for item in given)}
    for node, item in {**dict(zip(made, given, strict=False)), **passed}.items():
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
        replaced[node] = item
    return key


def _note(
    graph: fx.Graph, values: Sequence[fx.Node], like: Sequence[fx.Node]
) -> tuple[list[fx.Node], int]:
    # torch's caches hash such constants, so they are equal in every process.
    key = next(number for number in itertools.count(1) if number not in LAYOUTS)
    LAYOUTS[key] = [Layout.of(fake_value(node)) for node in like]
    call = graph.call_function(STAMP, (list(values), key))
    found = []
    with graph.inserting_after(call):
        for index in reversed(range(len(like))):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta["example_value"] = item.meta["val"] = fake_value(like[index])
            found.append(item)
    return found[::-1], key


# --- layers for stamps ---


def unfold(graph: fx.Graph, folded: Folded) -> None:
    """Replace the stamps in AOTAutograd's graph, in place; after NotUnfolded it is unusable."""
    found = {node.args[1]: node for node in graph.nodes if node.target is STAMP}
    values = [fake_value(node) for node in graph.nodes]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    for kind in folded.kinds:
        enter, leave = found.get(kind.enter), found.get(kind.leave)
        if mode is None or enter is None or leave is None:
            raise NotUnfolded("a layer that stands for others is not in the traced graph")
        body = _body(enter, leave)
        order = {node: index for index, node in enumerate(graph.nodes)}
        for key, stacks in kind.others.items():
            call = found.get(key)
            if call is None:
                continue  # the layer's results are unread
            if order[call] < order[leave]:
                raise NotUnfolded("layers were traced in another order")
            with graph.inserting_before(call), mode:
                _expand(graph, body, enter, leave, call, stacks)
        _take_out(graph, leave, leave.args[0])
        _take_out(graph, enter, enter.args[0])
    if any(node.target is STAMP for node in graph.nodes):
        raise NotUnfolded("a stamp is left in the traced graph")
    graph.lint()


def _body(enter: fx.Node, leave: fx.Node) -> list[fx.Node]:
    """The layer's computation in order, with its constants but without shared sizes."""
    items = list(enter.users)
    if any(item.target is not operator.getitem for item in items):
        raise NotUnfolded("the operands of a layer are read as a list")
    between: list[fx.Node] = []
    node = enter.next
    while node is not leave:
        if node.op == "output":
            raise NotUnfolded("a layer has no end")
        between.append(node)
        node = node.next
    inside = set(items)
    for node in between:
        if not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    for node in inside:
        if any(user not in inside and user is not leave for user in node.users):
            raise NotUnfolded(f"{node.name} is read behind its layer")
    pending = [*inside.difference(items)]
    seen: set[fx.Node] = set(items)
    while pending:
        node = pending.pop()
        if node in seen or (node not in inside and _is_size(fake_value(node))):
            continue
        seen.add(node)
        if node.op != "call_function" or node.target is STAMP or not is_pure(node):
            raise NotUnfolded(f"{node.name} is no function of what a layer takes")
        pending.extend(node.all_input_nodes)
    return [node for node in between if node in seen and node not in items]


def _expand(
    graph: fx.Graph,
    body: Sequence[fx.Node],
    enter: fx.Node,
    leave: fx.Node,
    call: fx.Node,
    stacks: dict[tuple[Any, ...], Any],
) -> None:
    operands: Any = call.args[0]
    new: dict[fx.Node, fx.Node] = {item: operands[item.args[1]] for item in enter.users}
    for node in body:
        copy = graph.node_copy(node, lambda source: new.get(source, source))
        copy.meta["val"] = _value_of_copy(node, copy)
        stack = tuple(node.meta.get("nn_module_stack") or ())
        if stack:
            if stack not in stacks:
                raise NotUnfolded(f"{node.name} was made in a module that no layer calls")
            copy.meta["nn_module_stack"] = stacks[stack]
        new[node] = copy
    results: Any = leave.args[0]
    _take_out(graph, call, [new.get(item, item) for item in results])


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


def _take_out(graph: fx.Graph, call: fx.Node, values: Any) -> None:
    for item in list(call.users):
        item.replace_all_uses_with(values[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(call)
