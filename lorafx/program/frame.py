"""One captured frame: what each input of its graph is.

Identity of the example tensors that Dynamo hands over says it (`Program.frame`). The frame is
dropped when its graph is compiled; nothing of it reaches the executable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lorafx.errors import ProvenanceError
from lorafx.model.sites import Group, Site
from lorafx.program.derived import Derived, Holder
from lorafx.program.roles import Role
from lorafx.program.row_dims import TOKEN_DIMS
from lorafx.program.stack import calling_modules
from lorafx.torch_internals.frames import input_place

InputKind = Literal[
    "symbol", "weight", "state", "bank", "slots", "packed", "argument", "result", "unknown"
]


#: Names of slots that the executable looks up: one per request, or the first one alone where no
#: input says how many requests there are.
SLOTS, ONE_SLOT = "slots", "slot"


@dataclass(frozen=True)
class FrameInput:
    """One graph input.

    Attributes:
        kind: "symbol" (a size), "weight" (of a selected site, or what was made of it), "state"
            (another parameter, buffer or attribute of a module), "bank", "slots", "packed" (packed
            base weight or bias), "argument" (of the call), "result" (of an earlier graph of the
            call, whose owner was proved there), "unknown" (made between two graphs, a global).
        sites: the sites whose base weight or bias this is.
        group: for banks and packed tensors.
        role: for arguments and results.
        derived: for weights, where this is a view or a copy of the base weight.
        holder: for state, the attribute that holds it.
        label: how to name the input in messages.
        part: the attribute of a tensor subclass that this is; "" for a whole input.
        counts: whether this symbol was the number of requests in the call that was captured.
    """

    kind: InputKind
    label: str
    sites: tuple[Site, ...] = ()
    group: Group | None = None
    role: Role | None = None
    derived: Derived | None = None
    holder: Holder | None = None
    part: str = ""
    counts: bool = False

    def taken_apart(self, part: str, value: Any) -> FrameInput:
        """The input that holds this attribute of a tensor subclass, or one of its sizes."""
        kind: InputKind = self.kind
        if not isinstance(value, Tensor):
            kind = "symbol"
        elif kind in ("argument", "result"):  # how its parts lie is the subclass's business
            kind = "unknown"
        sites = self.sites if kind == "weight" else ()
        return replace(self, kind=kind, label=f"{self.label}.{part}", sites=sites, part=part)

    @property
    def requests_dim(self) -> int | None:
        """The dimension that holds the requests, where this carries them and it is known."""
        if self.kind not in ("argument", "result") or self.role is None or not self.role.known:
            return None
        return None if self.role.several else self.role.dim

    @property
    def several_dim(self) -> int | None:
        """The dimension that holds several entries of each request."""
        return self.role.dim if self.role is not None and self.role.several else None


class Frame:
    """The inputs of one captured frame, by position, and by placeholder once AOT has traced it."""

    def __init__(self, inputs: Sequence[FrameInput]) -> None:
        self.inputs = tuple(inputs)
        #: Positions of buffers and other tensors of the model that its forward may write into.
        self.writable: tuple[int, ...] = ()
        #: It begins with the arguments of a call, so its inputs from them are what they are in
        #: every call. Elsewhere a local variable may hold something else the next time.
        self.begins_call = False
        #: The slots are one per token, in row-major order of (B, T), not one per request.
        self.per_token = False
        #: Arguments that hold one entry per token, with that dimension.
        self.token_dims: Mapping[str, int] = TOKEN_DIMS
        #: Arguments that hold several sequences of each request, in dimension 1: as many in all of
        #: them, which the graph checks when it runs.
        self.choices: tuple[str, ...] = ()
        self.by_node: dict[fx.Node, FrameInput] = {}
        #: Position of each placeholder among the arguments that the executable is called with.
        self.positions: dict[fx.Node, int] = {}
        #: Inputs that `match` added, by (position of a weight, which of the sites that share it,
        #: field of that site's bank). They follow the others in this order.
        self.extra_nodes: dict[tuple[int, int, str], fx.Node] = {}
        #: Modules whose call this frame is part of, by identity: their hooks run after it.
        self.callers = calling_modules()
        #: For each unmarked use that `match` met, by the weight's position and which of the sites
        #: that share it: whether that site's module was among the callers.
        self.inside: dict[tuple[int, int], bool] = {}

    def reorder(self, order: Sequence[int]) -> None:
        """Have the inputs in another order, `order` being their positions now. Before `bind`."""
        self.inputs = tuple(self.inputs[position] for position in order)
        self.writable = tuple(p for p, before in enumerate(order) if before in self.writable)

    @property
    def counted(self) -> tuple[int, ...]:
        """Positions of sizes that are taken for the number of requests."""
        return tuple(p for p, item in enumerate(self.inputs) if item.counts)

    def chosen(self, item: FrameInput) -> bool:
        """Whether an input holds as many sequences of each request as others of this kind."""
        of = item.role.argument if item.kind == "argument" and item.role is not None else None
        return of in self.choices

    @property
    def follows_another(self) -> bool:
        """True where some input was made in the running call: the model is in several graphs."""
        return any(item.kind in ("result", "unknown") for item in self.inputs)

    @property
    def taken(self) -> dict[int, Role]:
        """Roles of the inputs that earlier graphs returned, by position."""
        return {
            position: item.role
            for position, item in enumerate(self.inputs)
            if item.kind == "result" and item.role is not None
        }

    @property
    def handed(self) -> tuple[int, ...]:
        """Positions of the inputs that may hold something of requests without being known as
        arguments."""
        kinds = ("result", "unknown") if self.begins_call else ("result", "unknown", "argument")
        return tuple(p for p, item in enumerate(self.inputs) if item.kind in kinds)

    @property
    def carries_lora(self) -> bool:
        """True where the graph takes a bank, or the weight of a selected site."""
        return any(item.kind in ("bank", "weight") for item in self.inputs)

    def bind(self, graph: fx.Graph) -> None:
        """Map AOTAutograd's placeholders, which keep the order of Dynamo's, to the inputs."""
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for position, node in enumerate(placeholders):
            index, part = input_place(node, position)
            item = self.inputs[index]
            self.by_node[node] = item if part is None else item.taken_apart(part, fake_value(node))
            self.positions[node] = position

    def batch_size(self) -> Any:
        """The number of requests as tracing knows it (int or SymInt); None if no input
        carries any."""
        sizes: list[Any] = []
        for node, item in self.by_node.items():
            dim = item.requests_dim
            if item.role is not None and item.role.request is not None:
                sizes.append(item.role.requests)
            if dim is not None and dim < fake_value(node).dim():
                sizes.append(fake_value(node).shape[dim])
        # A size of one beside a larger batch is an argument that all requests share.
        return next((size for size in sizes if size != 1), sizes[0] if sizes else None)


def fake_value(node: fx.Node) -> Any:
    """The fake tensor (or symbol) that tracing recorded for `node`."""
    return node.meta.get("val")


def batch_symbols(frame: Frame) -> set[Any]:
    """The symbols (or ints) that are the number of requests, by contract, in this frame's graph.

    Raises:
        ProvenanceError: no input is known to hold requests, or the symbol may be another size.
    """
    found: set[Any] = set()
    others: set[Any] = set()
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
            if not frame.per_token and item.label != ONE_SLOT:
                found.update(sizes)
        elif dim is not None and dim < len(sizes):
            found.add(sizes.pop(dim))
            others.update(sizes)
        elif item.role is not None and item.role.request is not None:
            found.add(item.role.requests)
    if len(found) > 1:
        found.discard(1)
    if not found:
        raise ProvenanceError(
            "no input of this graph is known to hold the requests, which happens where the "
            "graph is not captured from a call of the model itself"
        )
    return found | counted


def several(frame: Frame) -> list[Any]:
    """The sizes (SymInts or ints) that hold several entries of each request."""
    return [
        fake_value(node).shape[item.several_dim]
        for node, item in frame.by_node.items()
        if item.several_dim is not None
    ]


def numbers_of_choices(frame: Frame) -> list[Any]:
    """The sizes (SymInts or ints) that are the number of sequences of each request."""
    chosen = [node for node, item in frame.by_node.items() if frame.chosen(item)]
    return [fake_value(node).shape[1] for node in chosen]


def token_inputs(frame: Frame) -> dict[fx.Node, int]:
    """The arguments that hold one entry per token, with that dimension (checked at entry)."""
    found: dict[fx.Node, int] = {}
    for node, item in frame.by_node.items():
        dim = frame.token_dims.get(item.role.argument) if item.role is not None else None
        value = fake_value(node)
        if item.role is None or item.role.dim != 0 or dim is None:
            continue
        if item.kind == "argument" and value.dim() > dim:
            found[node] = dim
    return found
