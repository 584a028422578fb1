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

import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.output_graph import SubgraphTracer
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.variables import nn_module
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.lazy import LazyConstantVariable
from torch._dynamo.variables.tensor import SymNodeVariable

from lorafx.capture.replay_arguments import (
    Arguments,
    NotAlike,
    inputs_alone,
    replayed_result,
    results_of,
)
from lorafx.capture.replay_calls import Stacks, still
from lorafx.capture.replay_graph import bound, inputs_of, moved_inputs, operators_of, sizes_read
from lorafx.capture.replay_guards import Moved
from lorafx.capture.replay_items import store, stores_of
from lorafx.capture.replay_sources import FrameScope
from lorafx.capture.replay_trace import Begun, Trace
from lorafx.kernels.ops.stamp_op import without_data

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
class Replay:
    """The layers of a model, and what was traced of them in the frame that is being converted."""

    layers: dict[int, nn.Module]
    #: Calls that were not traced.
    replayed: int = 0
    _output: Any = None
    _scope: FrameScope | None = None
    _traces: dict[type, list[Trace]] = field(default_factory=dict)
    #: What has been changed in the frame, once for each change.
    changed: list[Any] = field(default_factory=list)
    #: The calls that are being traced, each in the one before it.
    tracing: list[Begun] = field(default_factory=list)
    #: How many guards on symbols there were when a node was added while a call was being traced.
    at: dict[fx.Node, int] = field(default_factory=dict)

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
                begun = Begun(self, layer, tx, args, kwargs)
        except TorchDynamoException:
            raise
        except Exception:
            self._give_up()
            while output.graph._root.prev is not last:
                output.graph.erase_node(output.graph._root.prev)
        if begun is None:
            return trace()
        self.tracing.append(begun)
        try:
            with begun.watch.watching():
                result = trace()
        finally:
            self.tracing.pop()
        try:
            traces.append(self._trace(begun, tx, args, kwargs, result))
        except NotAlike:
            pass
        except Exception:
            self._give_up()
        for pick in begun.watch.picks:
            pick.number.realize()
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
            self.at.clear()

    def scope(self, tx: Any) -> FrameScope:
        if self._scope is None:
            self._scope = FrameScope(tx)
        return self._scope

    def note(self, output: Any, variable: Any, name: str | None) -> None:
        """`variable` is being changed; `name` is the attribute that is stored."""
        self._in(output)
        self.changed.append(variable)
        for begun in self.tracing:
            begun.changed.append((variable, name))

    def unnoted(self, look: Callable[[], Any]) -> Any:
        """What `look` finds, which is no reading of a layer that is being traced."""
        if not self.tracing:
            return look()
        with self.tracing[0].watch.unnoted():
            return look()

    def picked(self, args: Any) -> Any:
        """The item that a layer picks from a list by a number that is not to be read, or None."""
        return self.tracing[0].watch.pick(*args) if len(self.tracing) == 1 else None

    def found(self, variable: Any) -> None:
        """Dynamo knows an object, and has found its image."""
        for begun in self.tracing:
            begun.watch.found(variable)

    def _changed_objects(self, until: int | None = None) -> set[int]:
        """Identities of what is otherwise in the frame than it is outside of it; `until` says how
        many changes count."""
        changed = {id(variable) for variable in self.changed[:until] if _was_there(variable)}
        known = self._output.side_effects.id_to_variable
        return {number for number, variable in known.items() if id(variable) in changed}

    def _trace(self, begun: Begun, tx: Any, args: Any, kwargs: Any, result: Any) -> Trace:
        """What was made of a call whose tracing has ended.

        Raises:
            NotAlike: it did more than a replay does.
        """
        output, known = tx.output, begun.known
        watch = begun.watch
        watch.end()
        for item, name in begun.changed:
            picked = name is not None and item in watch.stored
            if not picked and (_was_there(item) or id(item) in known):
                raise NotAlike("something was changed that was there before")
        if output is not self._output or output.side_effects is not begun.effects:
            raise NotAlike("it was traced in parts")
        if len(output.random_calls) != begun.random or not still(begun.modes, tx):
            raise NotAlike("torch was set in another way, or Python drew a random number")
        operators = operators_of(output.graph, begun.last, begun.nodes, begun.outer)
        begun.guards.end(tx, self._changed_objects(begun.changes), watch.stored)
        arguments = Arguments(args, {**kwargs, **watch.attributes()})
        stores = stores_of(output.side_effects, watch.stored, begun.changed)
        returned = (result, *(each.value for each in stores))
        inputs = inputs_of(output.graph, operators, begun.guards, begun.nodes)
        begun.sizes.end(begun.guards, operators, self.at)
        return Trace(
            layer=begun.guards.module,
            changes=begun.changes,
            modes=begun.modes,
            guards=begun.guards,
            arguments=arguments,
            result=result,
            operators=operators,
            inputs=inputs,
            results=results_of(returned, set(operators), arguments, inputs),
            stores=stores,
            sizes=begun.sizes,
            read=sizes_read(operators, output.current_tracer) - inputs.keys(),
            watch=watch,
            known=known,
            outer=begun.outer,
            name=str(list(operators[0].meta["nn_module_stack"].values())[begun.outer][0]),
            calls={
                name: (begun.calls.get(name, 0), count - begun.calls.get(name, 0))
                for name, count in tx.num_calls.items()
                if count != begun.calls.get(name, 0)
            },
        )

    def _replayed(self, one: Trace, layer: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        """The result of the call, replayed from `one`.

        Raises:
            NotAlike: it must be traced. What has been added, of inputs and guards, is what that
                adds too.
        """
        watch, effects = one.watch, tx.output.side_effects
        changed = self.changed[one.changes :]
        apart = watch.apart() if changed else {}
        for variable in changed:
            matters = _was_there(variable) or id(variable) in one.known
            if matters and id(variable) not in apart:
                raise NotAlike("something was changed since")
        if not still(one.modes, tx):
            raise NotAlike("torch was set in another way")
        items = watch.picked_by(one.guards.number(layer))
        given = {**kwargs, **watch.attributes(items)}
        nodes, variables = one.arguments.paired(args, given)
        moved = Moved(one.guards, tx, layer, self._changed_objects(), items)
        moved.check()
        stacks = Stacks(one.layer, one.name, one.outer, one.calls, layer, tx)
        sizes = one.sizes.renamed()
        nodes.update(moved_inputs(one.inputs, moved, stacks, sizes, tx))
        moved.install(deferred=not self.tracing)  # a layer around it looks at its guards
        graph, tracer = tx.output.graph, tx.output.current_tracer
        read = one.read - nodes.keys()

        def operand(source: fx.Node) -> fx.Node:
            return bound(source, tracer) if source in read else nodes.get(source, source)

        for node in one.operators:
            sizes.reach(node)
            nodes[node] = copy = graph.node_copy(node, operand)
            if "example_value" in node.meta:
                copy.meta["example_value"] = sizes.value(node, tx.fake_mode)
            copy.meta["nn_module_stack"] = stacks.of(node)
            copy.meta["source_fn_stack"] = [(copy.name, node.meta["source_fn_stack"][0][1])]
            tracer._used_names.add(copy.name)
        sizes.reach(None)
        stacks.count()
        for node, variable in one.results.items():
            value, proxy = nodes[node].meta.pop("example_value"), fx.Proxy(nodes[node], tracer)
            if isinstance(variable, SymNodeVariable):
                variables[variable] = SymNodeVariable.create(tx, proxy, value)
                continue
            alone = inputs_alone(node, one.inputs)  # it may be one of them, or a view
            value = None if alone else without_data(value)
            variables[variable] = wrap_fx_proxy(tx, proxy, value)
        result = replayed_result(one.result, variables)
        store(one.stores, items, variables, effects)
        for source in dict.fromkeys(pick.number.source for pick in watch.picks):
            number = moved.now(source)
            LazyConstantVariable.create(number, moved.source(source)).realize()
        return result


def _was_there(variable: Any) -> bool:
    """Whether something was there before the frame."""
    kind = variable.mutation_type
    return variable.source is not None or (kind is not None and kind.scope == 0)


def _watch() -> None:
    """Have Dynamo tell the replay of its thread which modules are called and what is changed; it
    does so from now on, where there is one."""
    image = nn_module.UnspecializedNNModuleVariable
    call, call_builtin = image.call_function, BuiltinVariable.call_function
    known, create = SideEffects.__getitem__, SubgraphTracer.create_proxy
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
                name = args[0] if args else None
                _LOCAL.replay.note(self.output_graph_weakref(), variable, name)
            return change(self, variable, *args, **kwargs)

        return noted

    def call_python(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        replay = _LOCAL.replay
        if replay is not None and self.fn is operator.getitem and len(args) == 2:
            item = replay.picked(args)
            if item is not None:
                return item
        return call_builtin(self, tx, args, kwargs)

    def create_proxy(self: Any, *args: Any, **kwargs: Any) -> Any:
        replay = _LOCAL.replay
        if replay is None or not replay.tracing:
            return create(self, *args, **kwargs)
        before = len(self.output_graph.shape_env.guards)
        proxy = create(self, *args, **kwargs)
        replay.at[proxy.node] = before
        return proxy

    def found(self: Any, item: Any) -> Any:
        variable = known(self, item)
        if _LOCAL.replay is not None:
            _LOCAL.replay.found(variable)
        return variable

    call_function._lorafx = True  # type: ignore[attr-defined]
    for name in ("mutation", "store_attr"):
        setattr(SideEffects, name, noting(getattr(SideEffects, name)))
    for kind, name, method in (
        (image, "call_function", call_function),
        (BuiltinVariable, "call_function", call_python),
        (SubgraphTracer, "create_proxy", create_proxy),
        (SideEffects, "__getitem__", found),
    ):
        setattr(kind, name, method)
