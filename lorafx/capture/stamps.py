"""Repeated layers are traced by AOTAutograd once.

    of Dynamo's     h1 = layer(h0; W0); h2 = layer(h1; W1); h3 = layer(h2; W2)
    traced          x = stamp(h0, W0); h1 = stamp(layer(x)); h2 = stamp(h1, W1); ...
    afterwards      every stamp is the traced layer again, on its own operands

AOTAutograd goes through each operator of a graph twice, at some milliseconds each. Layers are
candidates because one module call made their nodes, and one stands for the others because their
canonical forms are equal (lorafx.passes.outline): the same calls, literals and aliasing, on
operands of the same metadata. What comes out is the graph that AOTAutograd would have made of all
layers. Every pass sees that one, and proves each layer as ever.

Only layers that are functions of their operands are folded. A layer that writes into an operand, or
returns one of them or a view of it, stays as it is: so do its neighbours, where they differ.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.errors import CaptureError
from lorafx.kernels.ops.stamp_op import LAYOUTS, Layout, without_data
from lorafx.passes.outline.isomorphism import Stretch
from lorafx.passes.outline.outline import repeats
from lorafx.passes.outline.regions import is_pure, is_view
from lorafx.program.frame import fake_value

STAMP = torch.ops.lorafx.stamp.default
_KEYS = itertools.count(1)
#: Calls of Dynamo's graph below which a repeat is traced as quickly as it is stamped.
LEAST = 8


class NotUnfolded(CaptureError):
    """The traced graph is not one that stamps can be taken out of; it is traced without any."""


@dataclass(frozen=True)
class _Kind:
    """Layers that are alike.

    Attributes:
        enter, leave: keys of the ops in front of the first one and behind it.
        others: of each other one its key, and by the modules that the first one's nodes were made
            in those that its own were.
    """

    enter: int
    leave: int
    others: dict[int, dict[tuple[Any, ...], Any]]


@dataclass
class Folded:
    """What was folded in one graph of Dynamo's, and how that was before."""

    module: fx.GraphModule
    before: fx.Graph
    kinds: list[_Kind] = field(default_factory=list)

    def restore(self) -> None:
        """Put Dynamo's own graph back."""
        self.forget()
        self.module.graph = self.before
        self.module.recompile()

    def forget(self) -> None:
        for kind in self.kinds:
            for key in (kind.enter, kind.leave, *kind.others):
                LAYOUTS.pop(key, None)


def fold(gm: fx.GraphModule) -> Folded | None:
    """Make repeated layers of Dynamo's graph stamps, in place; None where there are none."""
    values = {node: node.meta.get("example_value") for node in gm.graph.nodes}
    mode = next((v.fake_mode for v in values.values() if isinstance(v, FakeTensor)), None)
    if mode is None:
        return None
    folded = Folded(gm, fx.Graph())
    copied: dict[fx.Node, fx.Node] = {}
    folded.before.output(folded.before.graph_copy(gm.graph, copied))
    for node, copy in copied.items():
        for name in vars(node).keys() - vars(copy).keys():  # what Dynamo has noted on inputs
            setattr(copy, name, getattr(node, name))
    try:
        _fold(folded, values, mode)
    except Exception:  # without stamps the graph is traced as it always was
        folded.restore()
        return None
    if not folded.kinds:
        return None
    gm.recompile()
    return folded


def _fold(folded: Folded, values: Mapping[fx.Node, Any], mode: FakeTensorMode) -> None:
    gm = folded.module
    for node, value in values.items():
        node.meta["val"] = value
    places = {node: place for place, node in enumerate(values)}
    switches = [places[node] for node in values if _switches(node)]
    claimed: set[fx.Node] = set()
    replaced: dict[fx.Node, fx.Node] = {}
    for regions, stretches in repeats(gm, claimed, LEAST):
        begin, end = places[stretches[0].nodes[0]], places[stretches[-1].nodes[-1]]
        if any(begin < place < end for place in switches):
            continue  # equal calls may be traced in other ways behind it
        layers = _layers(stretches, replaced)
        stacks = [_calls(stretches[0], stretch) for stretch in stretches[1:]]
        if None not in stacks and _is_function(layers[0], mode):
            folded.kinds.append(_stamp(gm.graph, layers, stacks, replaced))
            claimed.update(node for region in regions for node in region.nodes)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def _switches(node: fx.Node) -> bool:
    """Whether a call may set how later ones are traced, as autocast and gradient mode do: it has no
    value."""
    return node.op.startswith("call_") and fake_value(node) is None


@dataclass(frozen=True)
class _Layer:
    """One layer of a kind: its nodes, the tensors that it takes, and what is read behind it."""

    nodes: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]


def _layers(stretches: Sequence[Stretch], replaced: Mapping[fx.Node, fx.Node]) -> list[_Layer]:
    """The layers of a kind. What is read behind one of them is a result of each. `replaced` are
    results of layers that were stamped since the stretches were looked at."""
    read = set()
    for stretch in stretches:
        own = set(stretch.nodes)
        for place, node in enumerate(stretch.nodes):
            if any(user not in own for user in node.users):
                read.add(place)
    found = []
    for stretch in stretches:
        sizes = tuple(node for node in stretch.operands if _is_size(fake_value(node)))
        taken = tuple(replaced.get(n, n) for n in stretch.operands if n not in sizes)
        returned = tuple(stretch.nodes[place] for place in sorted(read))
        found.append(_Layer(stretch.nodes, taken, returned, sizes))
    return found


def _is_size(value: Any) -> bool:
    """Equal for all layers of a kind: a symbol of theirs, or computed from some."""
    return isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    """A tensor that AOTAutograd takes as one."""
    return isinstance(value, FakeTensor) and value.layout is torch.strided


class _Writes(TorchDispatchMode):
    """Notes the memory that operators write into."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None or schema.is_mutable:
            tensors = pytree.tree_leaves((args, kwargs))
            self.memory |= {_memory(item) for item in tensors if isinstance(item, Tensor)}
        return func(*args, **kwargs)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _is_function(layer: _Layer, mode: FakeTensorMode) -> bool:
    """Whether the layer computes new tensors and does nothing else, tried on tensors without data.

    Operators that write are recognised as they run: a function of torch may write whatever its
    name is.
    """
    values = [fake_value(node) for node in (*layer.taken, *layer.returned)]
    if not layer.returned or not all(map(_is_plain, values)):
        return False
    made: dict[fx.Node, Any] = {node: fake_value(node) for node in layer.sizes}
    # With symbolic sizes, composite operators such as matmul are served by their decompositions.
    with enable_python_dispatcher(), mode, torch.inference_mode(False), torch.no_grad():
        made.update((node, Layout.of(fake_value(node)).empty()) for node in layer.taken)
        with _Writes() as writes:
            for node in layer.nodes:
                if node.op not in ("call_function", "call_method"):
                    return False  # a constant, or the graph of a branch
                args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = _called(node, args, kwargs)
    given = [_memory(made[node]) for node in layer.taken]
    returned = [_memory(made[node]) for node in layer.returned]
    apart = len({*given, *returned}) == len(given) + len(returned)
    return apart and writes.memory.isdisjoint(given)


def _called(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _calls(first: Stretch, other: Stretch) -> dict[tuple[Any, ...], Any] | None:
    """By the module calls that the first layer's nodes were made in, those of the other's; None
    where that is not one and the same for all nodes of a call."""
    stacks: dict[tuple[Any, ...], Any] = {}
    for mine, theirs in zip(first.nodes, other.nodes, strict=True):
        stack = theirs.meta.get("nn_module_stack") or {}
        known = stacks.setdefault(tuple(mine.meta.get("nn_module_stack") or ()), stack)
        if tuple(known) != tuple(stack):
            return None
    return stacks


def _stamp(
    graph: fx.Graph,
    layers: Sequence[_Layer],
    stacks: Sequence[Any],
    replaced: dict[fx.Node, fx.Node],
) -> _Kind:
    """Put ops in front of the first layer and behind it, and one in place of each other."""
    first, *others = layers
    with graph.inserting_before(first.nodes[0]):
        given, enter = _note(graph, first.taken, first.taken)
    inside = dict(zip(first.taken, given, strict=True))
    for node in first.nodes:
        for source, item in inside.items():
            node.replace_input_with(source, item)
    with graph.inserting_after(first.nodes[-1]):
        given, leave = _note(graph, first.returned, first.returned)
    _read_instead(first, given, replaced)
    keys: dict[int, dict[tuple[Any, ...], Any]] = {}
    for layer, stack in zip(others, stacks, strict=True):
        # The layers before may have been stamped just now.
        taken = [replaced.get(node, node) for node in layer.taken]
        with graph.inserting_before(layer.nodes[0]):
            given, key = _note(graph, taken, layer.returned)
        keys[key] = stack
        _read_instead(layer, given, replaced)
        for node in reversed(layer.nodes):
            graph.erase_node(node)
    return _Kind(enter, leave, keys)


def _read_instead(
    layer: _Layer, given: Sequence[fx.Node], replaced: dict[fx.Node, fx.Node]
) -> None:
    """Whoever reads a result of the layer behind it reads what its op returns."""
    own = {*layer.nodes, *(item.args[0] for item in given)}
    for node, item in zip(layer.returned, given, strict=True):
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in own)
        replaced[node] = item


def _note(
    graph: fx.Graph, values: Sequence[fx.Node], like: Sequence[fx.Node]
) -> tuple[list[fx.Node], int]:
    """A stamp that takes `values` and returns tensors like `like`; those, and its key."""
    key = next(_KEYS)
    LAYOUTS[key] = [Layout.of(fake_value(node)) for node in like]
    call = graph.call_function(STAMP, (list(values), key))
    found = []
    with graph.inserting_after(call):
        for index in reversed(range(len(like))):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta["example_value"] = item.meta["val"] = fake_value(like[index])
            found.append(item)
    return found[::-1], key


def unfold(gm: fx.GraphModule, folded: Folded) -> None:
    """Take the stamps out of what AOTAutograd made of the graph, in place.

    Raises:
        NotUnfolded: the graph is not what was expected. It must not be used then.
    """
    graph = gm.graph
    found = {node.args[1]: node for node in graph.nodes if node.target is STAMP}
    values = [fake_value(node) for node in graph.nodes]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    for kind in folded.kinds:
        enter, leave = found.get(kind.enter), found.get(kind.leave)
        if mode is None or enter is None or leave is None:
            raise NotUnfolded("a layer that stands for others is not in the traced graph")
        body = _body(graph, enter, leave)
        order = {node: index for index, node in enumerate(graph.nodes)}
        for key, stacks in kind.others.items():
            call = found.get(key)
            if call is None:
                continue  # nothing reads what that layer computes
            if order[call] < order[leave]:
                raise NotUnfolded("layers were traced in another order")
            with graph.inserting_before(call), mode:
                _expand(graph, body, enter, leave, call, stacks)
        for end in (leave, enter):
            _take_out(graph, end, end.args[0])
    folded.forget()
    if any(node.target is STAMP for node in graph.nodes):
        raise NotUnfolded("a stamp is left in the traced graph")
    graph.lint()


def _body(graph: fx.Graph, enter: fx.Node, leave: fx.Node) -> list[fx.Node]:
    """What is computed between the two ends, in order: from the operands, and the constants that
    go with it. Sizes are those of all layers, and stay where they are."""
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
    own = set(items)
    for node in between:
        if not own.isdisjoint(node.all_input_nodes):
            own.add(node)
    for node in own:
        if any(user not in own and user is not leave for user in node.users):
            raise NotUnfolded(f"{node.name} is read behind its layer")
    pending = [*own.difference(items)]
    seen: set[fx.Node] = set(items)
    while pending:
        node = pending.pop()
        if node in seen or (node not in own and _is_size(fake_value(node))):
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
    """The stamp `call` becomes a copy of the body on its own operands."""
    operands: Any = call.args[0]
    new: dict[fx.Node, fx.Node] = {item: operands[item.args[1]] for item in enter.users}
    for node in body:
        copy = graph.node_copy(node, lambda source: new.get(source, source))
        copy.meta["val"] = _value(node, copy)
        stack = tuple(node.meta.get("nn_module_stack") or ())
        if stack:
            if stack not in stacks:
                raise NotUnfolded(f"{node.name} was made in a module that no layer calls")
            copy.meta["nn_module_stack"] = stacks[stack]
        new[node] = copy
    results: Any = leave.args[0]
    _take_out(graph, call, [new.get(item, item) for item in results])


def _value(node: fx.Node, copy: fx.Node) -> Any:
    """The fake value of a node's copy: in its own memory, or its operand's where it is a view."""
    value = fake_value(node)
    if not is_view(node) and isinstance(value, Tensor):
        return without_data(value)
    base, other = (fake_value(item.all_input_nodes[0]) for item in (node, copy))
    plain = all(map(_is_plain, (value, base, other))) and not (value.is_conj() or value.is_neg())
    if plain and value.dtype == base.dtype and _memory(value) == _memory(base):
        return without_data(value, base, other)
    args, kwargs = fx.map_arg((copy.args, copy.kwargs), fake_value)
    return copy.target(*args, **kwargs)  # type: ignore[operator]


def _take_out(graph: fx.Graph, call: fx.Node, values: Any) -> None:
    for item in list(call.users):
        item.replace_all_uses_with(values[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(call)
