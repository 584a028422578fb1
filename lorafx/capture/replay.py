"""Dynamo traces one of several equal layers, and notes of the others what it would have noted.

    traced     h1 = layer0(h0)     operators, guards on layers[0].…, inputs layers[0].….weight
    replayed   h2 = layer1(h1)     the same operators, guards on layers[1].…, its own inputs

What Dynamo makes of a call follows from what it guards, and from the arguments. So a call is
replayed where each guard that the traced layer has holds for its layer too, and its arguments are
alike: the guards, inputs and operators that a trace of its own would add are copies. The graph is
the same, and so is what makes Dynamo trace anew. Wherever that is in doubt a layer is traced.

No module is touched: what is replayed is a call of Dynamo's own image of a module, while this
thread converts a frame of ours.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.variables import nn_module
from torch._dynamo.variables.builder import VariableBuilder, wrap_fx_proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lorafx.capture.replay_arguments import (
    Arguments,
    NotAlike,
    reachable,
    replayed_result,
    results_of,
    same_layout,
)
from lorafx.capture.replay_calls import Modes, Stacks, modes, still
from lorafx.capture.replay_guards import Guards, Moved, Scope
from lorafx.kernels.ops.stamp_op import Layout

#: Traces of a class that are kept; its layers are of more kinds where none of these fits.
_MOST = 4


class _Local(threading.local):
    replay: Replay | None = None


_LOCAL = _Local()


@contextmanager
def replaying(model: nn.Module | None) -> Iterator[None]:
    """Inside, equal layers of `model` are replayed in frames that this thread converts."""
    if model is None:
        yield
        return
    _watch()
    before = _LOCAL.replay
    try:
        _LOCAL.replay = Replay(layers_of(model))
        yield
    finally:
        _LOCAL.replay = before


def layers_of(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that may be alike, by identity: those that a container holds several of, and that
    are made of others themselves."""
    found: dict[int, nn.Module] = {}
    for container in model.modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        children = list(container.children())
        counts = Counter(map(type, children))
        for child in children:
            if counts[type(child)] > 1 and next(child.children(), None) is not None:
                found[id(child)] = child
    return found


@dataclass
class _Trace:
    """What Dynamo made of one call.

    Attributes:
        changes: how often something had been changed that was there before the frame.
        modes: whether torch is set as it was, and what else there was.
        operators: in order; `inputs`: graph inputs that are reached through the layer, and how.
        results: the tensors that were returned, by their operators.
        outer: how many modules' calls the layer's own is in, `name` that call's name.
        calls: by the names of modules how often each had been called before, and was now.
    """

    layer: nn.Module
    changes: int
    modes: Modes
    guards: Guards
    arguments: Arguments
    result: Any
    operators: list[fx.Node]
    inputs: dict[fx.Node, Any]
    results: dict[fx.Node, Any]
    outer: int
    name: str
    calls: dict[str, tuple[int, int]]


class _Begun:
    """What there was when a call began to be traced."""

    def __init__(self, replay: Replay, layer: Any, tx: Any, args: Any, kwargs: Any) -> None:
        self.effects = tx.output.side_effects
        self.nodes = set(tx.output.graph.nodes)
        self.last: fx.Node = tx.output.graph._root.prev
        self.known = reachable(args, kwargs, self.effects)
        self.changes = len(replay.changed)
        self.random = len(tx.output.random_calls)
        self.modes = modes(tx)
        self.outer = len(tx.nn_module_stack)
        self.calls = dict(tx.num_calls)
        self.guards = Guards(tx, replay.scope(tx), layer)
        #: What the call changes.
        self.changed: list[Any] = []


@dataclass
class Replay:
    """The layers of a model, and what was traced of them in the frame that is being converted."""

    layers: dict[int, nn.Module]
    #: Calls that were not traced.
    replayed: int = 0
    _output: Any = None
    _scope: Scope | None = None
    _traces: dict[type, list[_Trace]] = field(default_factory=dict)
    #: What was there before the frame and has been changed in it, once for each change.
    changed: list[Any] = field(default_factory=list)
    #: For each call that is being traced what it has changed so far.
    _changing: list[list[Any]] = field(default_factory=list)

    def called(self, layer: Any, tx: Any, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        """The result of a call of `layer`."""
        output = tx.output
        known = id(layer.value) in self.layers and layer.source is not None
        if not known or output.current_tracer.parent is not None:
            return trace()
        self._in(output)
        traces = self._traces.setdefault(type(layer.value), [])
        last, begun = output.graph._root.prev, None
        try:
            for one in traces:
                try:
                    result = self._replayed(one, layer, tx, args, kwargs)
                except NotAlike:
                    continue
                self.replayed += 1
                return result
            if len(traces) < _MOST:
                begun = _Begun(self, layer, tx, args, kwargs)
        except TorchDynamoException:
            raise
        except Exception:
            self._give_up()
            while output.graph._root.prev is not last:
                output.graph.erase_node(output.graph._root.prev)
        if begun is None:
            return trace()
        self._changing.append(begun.changed)
        try:
            result = trace()
        finally:
            self._changing.pop()
        try:
            traces.append(self._trace(begun, tx, args, kwargs, result))
        except NotAlike:
            pass
        except Exception:
            self._give_up()
        return result

    def _give_up(self) -> None:
        """This is another Dynamo than those that replays are written for."""
        self.layers = {}

    def _in(self, output: Any) -> None:
        """What follows is of the frame that becomes `output`."""
        if self._output is not output:  # another frame, or this one from its beginning
            self._output, self._scope = output, None
            self._traces.clear()
            self.changed.clear()

    def scope(self, tx: Any) -> Scope:
        if self._scope is None:
            self._scope = Scope(tx)
        return self._scope

    def note(self, output: Any, variable: Any) -> None:
        """`variable` is being changed."""
        self._in(output)
        for changed in self._changing:
            changed.append(variable)
        kind = variable.mutation_type
        if variable.source is not None or (kind is not None and kind.scope == 0):
            self.changed.append(variable)

    def _changed_objects(self) -> set[int]:
        """Identities of what is otherwise in the frame than it is outside of it."""
        changed = set(map(id, self.changed))
        known = self._output.side_effects.id_to_variable
        return {number for number, variable in known.items() if id(variable) in changed}

    def _trace(self, begun: _Begun, tx: Any, args: Any, kwargs: Any, result: Any) -> _Trace:
        """What was made of a call whose tracing has ended.

        Raises:
            NotAlike: it did more than a replay does.
        """
        output, known = tx.output, begun.known
        if len(self.changed) != begun.changes or any(id(item) in known for item in begun.changed):
            raise NotAlike("something was changed that was there before")
        if output is not self._output or output.side_effects is not begun.effects:
            raise NotAlike("it was traced in parts")
        if len(output.random_calls) != begun.random or not still(begun.modes, tx):
            raise NotAlike("torch was set in another way, or Python drew a random number")
        operators = _operators(output.graph, begun)
        begun.guards.end(tx, self._changed_objects())
        arguments = Arguments(args, kwargs)
        return _Trace(
            layer=begun.guards.module,
            changes=begun.changes,
            modes=begun.modes,
            guards=begun.guards,
            arguments=arguments,
            result=result,
            operators=operators,
            inputs=_inputs(output.graph, operators, begun),
            results=results_of(result, set(operators), arguments),
            outer=begun.outer,
            name=str(list(operators[0].meta["nn_module_stack"].values())[begun.outer][0]),
            calls={
                name: (begun.calls.get(name, 0), count - begun.calls.get(name, 0))
                for name, count in tx.num_calls.items()
                if count != begun.calls.get(name, 0)
            },
        )

    def _replayed(self, one: _Trace, layer: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        """The result of the call, replayed from `one`.

        Raises:
            NotAlike: it must be traced. What has been added, of inputs and guards, is what that
                adds too.
        """
        if one.changes != len(self.changed) or not still(one.modes, tx):
            raise NotAlike("something was changed since")
        nodes, variables = one.arguments.paired(args, kwargs)
        moved = Moved(one.guards, tx, layer, self._changed_objects())
        moved.check()
        stacks = Stacks(one.layer, one.name, one.outer, one.calls, layer, tx)
        for node, source in one.inputs.items():
            nodes[node] = _input(node, source, moved, stacks, tx)
        moved.install()
        graph, tracer = tx.output.graph, tx.output.current_tracer
        for node in one.operators:
            nodes[node] = copy = graph.node_copy(node, lambda source: nodes.get(source, source))
            copy.meta["nn_module_stack"] = stacks.of(node)
            copy.meta["source_fn_stack"] = [(copy.name, node.meta["source_fn_stack"][0][1])]
            if node in one.results:
                del copy.meta["example_value"]
            tracer._used_names.add(copy.name)
        stacks.count()
        for node, variable in one.results.items():
            with tx.fake_mode:
                value = Layout.of(node.meta["example_value"]).empty()
            variables[variable] = wrap_fx_proxy(tx, fx.Proxy(nodes[node], tracer), value)
        return replayed_result(one.result, variables)


def _operators(graph: fx.Graph, begun: _Begun) -> list[fx.Node]:
    """The operators of a call that was traced behind `last`.

    Raises:
        NotAlike: there are none, or it is more than operators that was added.
    """
    found = []
    node = begun.last.next
    while node is not graph._root:
        found.append(node)
        node = node.next
    added = [node for node in graph.nodes if node not in begun.nodes and node.op != "placeholder"]
    if not found or added != found:
        raise NotAlike("something was put in front of the layer's operators")
    for node in found:
        value = node.meta.get("example_value")
        stack = node.meta.get("nn_module_stack") or {}
        plain = len(stack) > begun.outer and len(node.meta.get("source_fn_stack", ())) == 1
        if node.op not in ("call_function", "call_method") or not plain:
            raise NotAlike(f"{node.name} is not an operator of the layer")
        if value is not None and free_unbacked_symbols(value):
            raise NotAlike(f"{node.name} has a size of its own")
    return found


def _inputs(graph: fx.Graph, operators: Sequence[fx.Node], begun: _Begun) -> dict[fx.Node, Any]:
    """Graph inputs that are reached through the layer, in order, and their sources.

    Raises:
        NotAlike: one is reached in another way, or something else is read that is not an argument.
    """
    inputs: dict[fx.Node, Any] = {}
    guards = begun.guards
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and guards.concerns(source):
            inputs[node] = source
    own = {id(item) for item in (*guards.module.parameters(), *guards.module.buffers())}
    made = set(operators)
    for item in dict.fromkeys(item for node in operators for item in node.all_input_nodes):
        if item in made or item in inputs:
            continue
        if item.op != "placeholder" and item not in begun.nodes:
            raise NotAlike(f"{item.name} is computed in front of the layer")
        if id(getattr(item.meta.get("grapharg"), "example", None)) in own:
            raise NotAlike(f"{item.name} is the layer's, and something else's")
    return inputs


def _input(node: fx.Node, source: Any, moved: Moved, stacks: Stacks, tx: Any) -> fx.Node:
    """The graph input of the other layer that is what `node` is of the traced one."""
    if moved.common(source) is not None:
        return node
    value = moved.now(source)
    if not isinstance(value, Tensor) or not moved.is_new(value, source):
        raise NotAlike(f"{source.name} is also something else")
    outer = tx.nn_module_stack
    try:
        tx.nn_module_stack = stacks.of(node)
        new = VariableBuilder(tx, moved.source(source))(value).as_proxy().node
    finally:
        tx.nn_module_stack = outer
    if not same_layout(node.meta["example_value"], new.meta["example_value"]):
        raise NotAlike(f"{source.name} is laid out in another way")
    assert isinstance(new, fx.Node)
    return new


def _watch() -> None:
    """Have Dynamo tell the replay of its thread which modules are called and what is changed; it
    does so from now on, where there is one."""
    image = nn_module.UnspecializedNNModuleVariable
    call = image.call_function
    if getattr(call, "_lorafx", False):
        return

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        replay = _LOCAL.replay
        if replay is None:
            return call(self, tx, args, kwargs)
        return replay.called(self, tx, args, kwargs, lambda: call(self, tx, args, kwargs))

    def noting(change: Any) -> Any:
        def noted(self: Any, variable: Any, *args: Any, **kwargs: Any) -> Any:
            if _LOCAL.replay is not None:
                _LOCAL.replay.note(self.output_graph_weakref(), variable)
            return change(self, variable, *args, **kwargs)

        return noted

    call_function._lorafx = True  # type: ignore[attr-defined]
    for name in ("mutation", "store_attr"):
        setattr(SideEffects, name, noting(getattr(SideEffects, name)))
    setattr(image, "call_function", call_function)  # noqa: B010  a method for mypy
