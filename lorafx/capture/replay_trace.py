"""What there was when Dynamo began to trace a layer's call, and what it made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lorafx.capture.replay_arguments import Arguments, reachable
from lorafx.capture.replay_calls import Modes, modes
from lorafx.capture.replay_guards import Guards
from lorafx.capture.replay_items import Store, Watch
from lorafx.capture.replay_sizes import LayerSizes


@dataclass
class Trace:
    """What Dynamo made of one call.

    Attributes:
        changes: how often something had been changed that was there before the frame.
        modes: whether torch is set as it was, and what else there was.
        operators: in order; `inputs`: graph inputs that are reached through the layer, and how.
        results: the tensors that were returned or stored, by their operators.
        stores: what was stored in items of lists that the layer picked, which `watch` tells of.
        sizes: the symbols that came with the layer; `read`: inputs that are others' sizes.
        known: what there was that a call may change.
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
    stores: list[Store]
    sizes: LayerSizes
    read: set[fx.Node]
    watch: Watch
    known: dict[int, Any]
    outer: int
    name: str
    calls: dict[str, tuple[int, int]]


class Begun:
    """What there was when a call began to be traced."""

    def __init__(self, replay: Any, layer: Any, tx: Any, args: Any, kwargs: Any) -> None:
        self.effects = tx.output.side_effects
        self.nodes = set(tx.output.graph.nodes)
        self.last: fx.Node = tx.output.graph._root.prev
        self.known = replay.unnoted(lambda: reachable(args, kwargs, self.effects))
        self.changes = len(replay.changed)
        self.random = len(tx.output.random_calls)
        self.modes = modes(tx)
        self.outer = len(tx.nn_module_stack)
        self.calls = dict(tx.num_calls)
        self.guards = Guards(tx, replay.scope(tx), layer)
        self.sizes = LayerSizes(tx)
        #: What the call changes: of what is stored, the attributes.
        self.changed: list[tuple[Any, str | None]] = []
        self.watch = Watch(tx, self.guards, args, kwargs, watched=not replay.tracing)
