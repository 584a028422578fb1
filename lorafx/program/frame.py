"""A captured frame: the meaning of each input of its graph.

`Program.frame` finds it by the identity of Dynamo's example tensors. The frame is dropped after
compilation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from lorafx.errors import ProvenanceError
from lorafx.model.runtime import Gates
from lorafx.program.argument_roles import TOKEN_DIMS, Role
from lorafx.program.inputs import FrameInput
from lorafx.program.stack import calling_modules
from lorafx.torch_internals.frames import input_place

#: Slots that the executable looks up: one for each request, or only the first if no input tells the
#: number of requests.
SLOTS, ONE_SLOT = "slots", "slot"
#: Inputs that are fields of `lorafx.model.runtime.Gates`, looked up as well.
GATES = {f"gate_{name}": name for name in Gates._fields}
LOOKED_UP = (SLOTS, ONE_SLOT, *GATES)


class SlotForm(NamedTuple):
    """How a graph gets the slots of rows.

    Attributes:
        per_token: slots are given per token, in row-major order of (B, T), not per request.
        gates: the number of adapters that a token, or a request, has with weights; 0: one without.
        chosen: how many of these adapters modules choose for a token at most; 0: they are given.
        layers: paths of the sites that have weights of their own, in the order of these; else none.
    """

    per_token: bool = False
    gates: int = 0
    chosen: int = 0
    layers: tuple[str, ...] = ()


#: One slot for each request.
PER_REQUEST = SlotForm()


class Frame:
    """A captured frame's inputs by position, and by placeholder of its graph."""

    def __init__(self, inputs: Sequence[FrameInput]) -> None:
        self.inputs = tuple(inputs)
        #: Positions of the model's tensors that its forward may write into.
        self.writable: tuple[int, ...] = ()
        #: Whether it begins with the call's arguments, which mean the same in every call.
        self.begins_call = False
        self.slots = PER_REQUEST
        #: Arguments with an entry for each token -> that dimension.
        self.token_dims: Mapping[str, int] = TOKEN_DIMS
        #: Arguments with several sequences of each request in dimension 1; executables check that
        #: all of them have equally many.
        self.choices: tuple[str, ...] = ()
        self.by_node: dict[fx.Node, FrameInput] = {}
        #: Placeholder -> position among the executable's arguments.
        self.positions: dict[fx.Node, int] = {}
        #: Inputs added by `match` after the others, by (position of a weight, index among the sites
        #: that share it, field of that site's bank), in order.
        self.extra_nodes: dict[tuple[int, int, str], fx.Node] = {}
        #: For each kind of layers that `fold` left out, for each of them, the origins (`COPIED`) of
        #: its nodes in Dynamo's graph.
        self.folded: list[list[list[list[Any]]]] = []
        #: Dynamo's graph as it was before `fold`, where that changed it.
        self.whole: fx.Graph | None = None
        #: Identities of the modules in whose calls this frame runs: their hooks run after it.
        self.callers = calling_modules()
        #: Uses without a mark that `match` found, by the weight's position and the site's index ->
        #: whether the site's module was among the callers.
        self.inside: dict[tuple[int, int], bool] = {}

    @property
    def counted(self) -> tuple[int, ...]:
        """Positions of sizes that count as the number of requests."""
        return tuple(p for p, item in enumerate(self.inputs) if item.counts)

    def has_choices(self, item: FrameInput) -> bool:
        name = item.role.argument if item.kind == "argument" and item.role is not None else None
        return name in self.choices

    @property
    def follows_another(self) -> bool:
        return any(item.kind in ("result", "unknown") for item in self.inputs)

    @property
    def taken(self) -> dict[int, Role]:
        """The roles of inputs that are results of earlier graphs, by position."""
        return {
            position: item.role
            for position, item in enumerate(self.inputs)
            if item.kind == "result" and item.role is not None
        }

    @property
    def handed(self) -> tuple[int, ...]:
        """Positions of inputs, other than arguments, that may hold data of requests."""
        kinds = ("result", "unknown") if self.begins_call else ("result", "unknown", "argument")
        return tuple(p for p, item in enumerate(self.inputs) if item.kind in kinds)

    @property
    def carries_lora(self) -> bool:
        return any(item.kind in ("bank", "weight") for item in self.inputs)

    def bind(self, graph: fx.Graph) -> None:
        """Map the placeholders of Dynamo's graph, or then of AOTAutograd's, to the inputs."""
        self.by_node, self.positions = {}, {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for position, node in enumerate(placeholders):
            index, part = input_place(node, position)
            item = self.inputs[index]
            self.by_node[node] = item if part is None else item.part_of(part, fake_value(node))
            self.positions[node] = position

    def batch_size(self) -> Any:
        """The number of requests at tracing (int or SymInt); None if no input carries requests."""
        sizes: list[Any] = []
        for node, item in self.by_node.items():
            dim = item.requests_dim
            if item.role is not None and item.role.request is not None:
                sizes.append(item.role.requests)
            if dim is not None and dim < fake_value(node).dim():
                sizes.append(fake_value(node).shape[dim])
        # An argument of size one beside larger ones is shared by all requests.
        return next((size for size in sizes if size != 1), sizes[0] if sizes else None)

    def slot_count(self) -> Any:
        """The number of slots of a batch: of its requests, or of their tokens; as `batch_size`."""
        size, tokens = self.batch_size(), token_inputs(self) if self.slots.per_token else {}
        lengths = [fake_value(node).shape[dim] for node, dim in tokens.items()]
        return size * lengths[0] if lengths and size is not None else size


def fake_value(node: fx.Node) -> Any:
    """The fake tensor or symbol of `node`, from AOTAutograd or Dynamo."""
    return node.meta.get("val", node.meta.get("example_value"))


def batch_symbols(frame: Frame) -> set[Any]:
    """The symbols (or ints) that are the number of requests. Raises ProvenanceError if no input is
    known to hold requests."""
    symbols: set[Any] = set()
    counted: set[Any] = set()
    for node, item in frame.by_node.items():
        value = fake_value(node)
        if not isinstance(value, torch.Tensor):
            if item.counts and isinstance(value, torch.SymInt):
                counted.add(value.node.expr)
            continue
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape]
        dim = item.requests_dim
        if item.kind == "slots":
            if not frame.slots.per_token and item.label != ONE_SLOT:
                symbols.update(sizes)
        elif dim is not None and dim < len(sizes):
            symbols.add(sizes[dim])
        elif item.role is not None and item.role.request is not None:
            symbols.add(item.role.requests)
    if len(symbols) > 1:
        symbols.discard(1)
    if not symbols:
        raise ProvenanceError(
            "no input of this graph is known to hold the requests, which happens where the "
            "graph is not captured from a call of the model itself"
        )
    return symbols | counted


def repeated_sizes(frame: Frame) -> list[Any]:
    """The sizes (SymInts or ints) that are a multiple of the number of requests."""
    return [
        fake_value(node).shape[item.several_dim]
        for node, item in frame.by_node.items()
        if item.several_dim is not None
    ]


def numbers_of_choices(frame: Frame) -> list[Any]:
    """The sizes (SymInts or ints) that are the number of sequences of each request."""
    nodes = [node for node, item in frame.by_node.items() if frame.has_choices(item)]
    return [fake_value(node).shape[1] for node in nodes]


def token_inputs(frame: Frame) -> dict[fx.Node, int]:
    """Arguments with an entry for each token -> the dimension of tokens, checked at entry."""
    dims: dict[fx.Node, int] = {}
    for node, item in frame.by_node.items():
        dim = frame.token_dims.get(item.role.argument) if item.role is not None else None
        value = fake_value(node)
        if item.role is None or item.role.dim != 0 or dim is None:
            continue
        if item.kind == "argument" and value.dim() > dim:
            dims[node] = dim
    return dims
