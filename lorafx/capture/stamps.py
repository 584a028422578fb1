"""Repeated layers are traced by AOTAutograd once.

    of Dynamo's     h1 = layer(h0; W0); h2 = layer(h1; W1); h3 = layer(h2; W2)
    traced          x = stamp(h0, W0); h1 = stamp(layer(x)); h2 = stamp(h1, W1); ...
    afterwards      every stamp is the traced layer again, on its own operands

AOTAutograd goes through each operator of a graph twice, at some milliseconds each. Layers are
candidates because one module call made their nodes, and one stands for the others because their
canonical forms are equal (lorafx.passes.outline): the same calls, literals and aliasing, on
operands of the same metadata. What comes out is the graph that AOTAutograd would have made of all
layers. Every pass sees that one, and proves each layer as ever.

Only layers that are functions of their operands are folded, and those that also write into inputs
of the graph, as a cache is: what such a layer makes of them is a result, which is copied into them
behind it. A layer that writes elsewhere, or returns an operand or a view of it, stays as it is: so
do its neighbours, where they differ.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lorafx.capture.failures import chain
from lorafx.capture.stamp_layers import (
    Effects,
    Layer,
    effects_of,
    is_plain,
    is_size,
    layers_of,
)
from lorafx.errors import CaptureError
from lorafx.kernels.ops.stamp_op import LAYOUTS, Layout
from lorafx.model.module_graph import storage_key
from lorafx.passes.outline.isomorphism import Stretch
from lorafx.passes.outline.outline import repeats
from lorafx.passes.outline.regions import is_pure, is_view
from lorafx.program.frame import fake_value
from lorafx.torch_internals.dynamo import _log_api_usage_once
from lorafx.torch_internals.fake_tensors import FakeTensor, FakeTensorMode

STAMP = torch.ops.lorafx.stamp.default
OVERWRITE = torch.ops.lorafx.overwrite.default
#: Calls without a value that do nothing in a graph.
_INERT = frozenset({_log_api_usage_once})
#: Calls of Dynamo's graph below which a repeat is traced as quickly as it is stamped.
LEAST = 8


class NotUnfolded(CaptureError):
    """The traced graph is not one that stamps can be taken out of; it is traced without any."""


def refused_by_stamps(error: BaseException) -> str | None:
    """Why stamps could not be taken out of the graph that failed so; None where it failed for
    another reason. Compilers put errors of theirs around ours."""
    found = next((item for item in chain(error) if isinstance(item, NotUnfolded)), None)
    return None if found is None else str(found)


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


class _Before(NamedTuple):
    """A node, and what it was before layers were folded and other passes saw it."""

    node: fx.Node
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str

    @classmethod
    def of(cls, node: fx.Node) -> _Before:
        return cls(node, node.op, node.target, node.args, node.kwargs, node.name)


@dataclass
class Folded:
    """What was folded in one graph of Dynamo's, and how that was before: its nodes in order."""

    module: fx.GraphModule
    before: Sequence[_Before]
    kinds: list[_Kind] = field(default_factory=list)

    def restore(self) -> None:
        """Put a graph like Dynamo's own back."""
        self.forget()
        self.module.graph = _rebuilt(self.before)
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
    folded = Folded(gm, list(map(_Before.of, gm.graph.nodes)))
    try:
        _fold(folded, values, mode)
    except Exception:  # without stamps the graph is traced as it always was
        folded.restore()
        return None
    if not folded.kinds:
        return None
    gm.recompile()
    return folded


def _rebuilt(before: Sequence[_Before]) -> fx.Graph:
    """The graph that these nodes were, some of which are erased."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node, op, target, args, kwargs, name in before:
        taken: Any = fx.map_arg((args, kwargs), made.__getitem__)
        copy = graph.create_node(op, target, taken[0], taken[1], name, node.type)
        copy.meta = {key: item for key, item in node.meta.items() if key != "val"}
        for key in vars(node).keys() - vars(copy).keys():  # what Dynamo has noted on inputs
            setattr(copy, key, getattr(node, key))
        made[node] = copy
    return graph


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
        layers = layers_of(stretches, replaced)
        stacks = [_calls(stretches[0], stretch) for stretch in stretches[1:]]
        effects = None if None in stacks else effects_of(layers, mode)
        if effects is not None:
            folded.kinds.append(_stamp(gm.graph, layers, stacks, effects, replaced))
            claimed.update(node for region in regions for node in region.nodes)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def _switches(node: fx.Node) -> bool:
    """Whether a call may set how later ones are traced, as autocast and gradient mode do: it has no
    value, and takes none either, as an assignment to items of a tensor does."""
    if not node.op.startswith("call_") or fake_value(node) is not None or node.target in _INERT:
        return False
    return not any(isinstance(fake_value(source), Tensor) for source in node.all_input_nodes)


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
    layers: Sequence[Layer],
    stacks: Sequence[Any],
    effects: Effects,
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
    with graph.inserting_before(first.nodes[-1].next):
        changed = [inside[first.taken[place]] for place in effects.written]
        made = effects.made_by(first)
        leave = _finish(graph, first, [*made, *changed], effects, replaced)
    keys: dict[int, dict[tuple[Any, ...], Any]] = {}
    for layer, stack in zip(others, stacks, strict=True):
        # The layers before may have been stamped just now.
        layer = replace(layer, taken=tuple(replaced.get(node, node) for node in layer.taken))
        with graph.inserting_before(layer.nodes[0]):
            key = _finish(graph, layer, layer.taken, effects, replaced)
        keys[key] = stack
        for node in reversed(layer.nodes):
            graph.erase_node(node)
    return _Kind(enter, leave, keys)


def _finish(
    graph: fx.Graph,
    layer: Layer,
    values: Sequence[fx.Node],
    effects: Effects,
    replaced: dict[fx.Node, fx.Node],
) -> int:
    """A stamp that takes `values` and gives what the layer makes and what it makes of the operands
    that it writes into, which is copied into them. Whoever reads a result of the layer reads that.
    """
    changed = [layer.taken[place] for place in effects.written]
    made = effects.made_by(layer)
    given, key = _note(graph, values, [*made, *changed])
    for node, item in zip(changed, given[len(made) :], strict=True):
        graph.call_function(OVERWRITE, (node, item))
    passed = {layer.returned[at]: layer.taken[place] for at, place in effects.passed.items()}
    own = {*layer.nodes, *(item.args[0] for item in given)}
    for node, item in {**dict(zip(made, given, strict=False)), **passed}.items():
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in own)
        replaced[node] = item
    return key


def _note(
    graph: fx.Graph, values: Sequence[fx.Node], like: Sequence[fx.Node]
) -> tuple[list[fx.Node], int]:
    """A stamp that takes `values` and returns tensors like `like`; those, and its key."""
    # Torch's caches know graphs by such constants, so they are equal in every process.
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


def unfold(graph: fx.Graph, folded: Folded) -> None:
    """Take the stamps out of what AOTAutograd made of the graph, in place.

    Raises:
        NotUnfolded: the graph is not what was expected. It must not be used then.
    """
    found = {node.args[1]: node for node in graph.nodes if node.target is STAMP}
    values = [fake_value(node) for node in graph.nodes]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    for kind in folded.kinds:
        enter, leave = found.get(kind.enter), found.get(kind.leave)
        if mode is None or enter is None or leave is None:
            raise NotUnfolded("a layer that stands for others is not in the traced graph")
        body = _body(graph, enter, leave)
        laid_out = {node: _LaidOut.of(node) for node in body}
        order = {node: index for index, node in enumerate(graph.nodes)}
        for key, stacks in kind.others.items():
            call = found.get(key)
            if call is None:
                continue  # nothing reads what that layer computes
            if order[call] < order[leave]:
                raise NotUnfolded("layers were traced in another order")
            with graph.inserting_before(call), mode:
                _expand(graph, laid_out, enter, leave, call, stacks)
        _take_out(graph, leave, leave.args[0])
        _take_out(graph, enter, enter.args[0])
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
        if node in seen or (node not in own and is_size(fake_value(node))):
            continue
        seen.add(node)
        if node.op != "call_function" or node.target is STAMP or not is_pure(node):
            raise NotUnfolded(f"{node.name} is no function of what a layer takes")
        pending.extend(node.all_input_nodes)
    return [node for node in between if node in seen and node not in items]


def _expand(
    graph: fx.Graph,
    body: Mapping[fx.Node, _LaidOut],
    enter: fx.Node,
    leave: fx.Node,
    call: fx.Node,
    stacks: dict[tuple[Any, ...], Any],
) -> None:
    """The stamp `call` becomes a copy of the body on its own operands."""
    operands: Any = call.args[0]
    new: dict[fx.Node, fx.Node] = {item: operands[item.args[1]] for item in enter.users}
    for node, value in body.items():
        copy = graph.node_copy(node, lambda source: new.get(source, source))
        copy.meta["val"] = value.of_copy(copy)
        stack = tuple(node.meta.get("nn_module_stack") or ())
        if stack:
            if stack not in stacks:
                raise NotUnfolded(f"{node.name} was made in a module that no layer calls")
            copy.meta["nn_module_stack"] = stacks[stack]
        new[node] = copy
    results: Any = leave.args[0]
    _take_out(graph, call, [new.get(item, item) for item in results])


@dataclass(frozen=True)
class _LaidOut:
    """How a node's fake value is made again for a copy of the node.

    Attributes:
        layouts: of one tensor, or of several in a `kind`; none where the operator has to tell.
        mode: of new tensors.
        offset: of a view, behind the first element of its operand.
    """

    layouts: tuple[Layout, ...] = ()
    kind: Callable[[list[Any]], Any] | None = None
    mode: FakeTensorMode | None = None
    offset: int | torch.SymInt = 0

    @classmethod
    def of(cls, node: fx.Node) -> _LaidOut:
        value = fake_value(node)
        if not is_view(node):
            if isinstance(value, FakeTensor):
                return cls((Layout.of(value),), mode=value.fake_mode)
            if isinstance(value, (list, tuple)) and value and all(map(is_plain, value)):
                layouts = tuple(map(Layout.of, value))
                if len({*map(storage_key, value)}) == len(value):
                    return cls(layouts, value.__class__, value[0].fake_mode)
        base: Any = fake_value(node.all_input_nodes[0]) if node.all_input_nodes else None
        plain = is_plain(value) and is_plain(base) and not (value.is_conj() or value.is_neg())
        if plain and value.dtype == base.dtype and storage_key(value) == storage_key(base):
            offset = value.storage_offset() - base.storage_offset()
            return cls((Layout.of(value),), offset=offset)
        return cls()

    def of_copy(self, copy: fx.Node) -> Any:
        """In memory of its own, or its operand's where it is a view."""
        if self.mode is not None:
            values = [layout.empty(self.mode) for layout in self.layouts]
            return values[0] if self.kind is None else self.kind(values)
        if self.layouts and is_plain(other := fake_value(copy.all_input_nodes[0])):
            return self.layouts[0].view_of(other, self.offset)
        args, kwargs = fx.map_arg((copy.args, copy.kwargs), fake_value)
        return copy.target(*args, **kwargs)  # type: ignore[operator]


def _take_out(graph: fx.Graph, call: fx.Node, values: Any) -> None:
    """Whoever reads a result of `call` reads the value."""
    for item in list(call.users):
        item.replace_all_uses_with(values[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(call)
