"""One captured frame: what each input of its graph is.

Dynamo hands the backend a graph and the real example tensors. Identity of those tensors says what
each input is: a weight of some module, a bank, the slots, a packed weight, an argument of the
call. The frame is dropped when its graph is compiled; nothing of it reaches the executable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from lorafx.errors import ProvenanceError
from lorafx.model.sites import Group, Site
from lorafx.program.roles import Role
from lorafx.program.row_dims import TOKEN_DIMS, choices, new_tokens
from lorafx.program.stack import calling_modules
from lorafx.torch_internals.frames import input_place, size_source, source_name

if TYPE_CHECKING:
    from lorafx.program.derived import Derived, Holder
    from lorafx.program.program import Program

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
        counts: for symbols, this was the number of requests when the graph was captured: a size
            of a tensor that the graph does not take, whose rows they are.
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
        #: Sizes that were equal in the call that was captured may be one symbol.
        self.duck_shaped = False
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

    @classmethod
    def of(cls, program: Program, graph: fx.Graph, examples: Sequence[Any]) -> Frame:
        """Classify the inputs of a Dynamo graph by the identity of their example values."""
        known = program.known_tensors()
        arguments = program.call_arguments()
        derived = program.derived.inputs(examples, known, arguments)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = []
        for node, example in zip(placeholders, examples, strict=True):
            label = source_name(node)
            if not isinstance(example, Tensor):
                inputs.append(
                    FrameInput("symbol", label, counts=_counts(program, node, arguments, known))
                )
            elif id(example) in derived:
                part = derived[id(example)]
                inputs.append(FrameInput("weight", label, sites=part.sites, derived=part))
            elif id(example) in known:
                inputs.append(known[id(example)])
            elif id(example) in arguments:
                inputs.append(FrameInput("argument", label, role=arguments[id(example)]))
            elif example.dim() == 0 and example.numel() == 1:
                # Dynamo turns Python floats held by modules into 0-d tensors.
                inputs.append(FrameInput("state", label))
            else:
                role = program.earlier_result(example)
                kind: InputKind = "unknown" if role is None else "result"
                inputs.append(FrameInput(kind, label, role=role))
        frame = cls(_told_apart(program, placeholders, inputs, examples))
        if program.call is not None:
            frame.token_dims = new_tokens(program.call.named)
            frame.choices = choices(program.call.named)
        frame.writable = tuple(
            position
            for position, (item, example) in enumerate(zip(inputs, examples, strict=True))
            if item.holder is not None and not isinstance(example, nn.Parameter)
        )
        return frame

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
        """Positions of the inputs that may hold something of requests, where it is not settled
        that they are the call's arguments."""
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
        """The number of requests as tracing knows it (int or SymInt), or None: no argument of
        this frame carries requests."""
        sizes: list[Any] = []
        for node, item in self.by_node.items():
            dim = item.requests_dim
            if item.role is not None and item.role.request is not None:
                sizes.append(item.role.requests)
            if dim is not None and dim < fake_value(node).dim():
                sizes.append(fake_value(node).shape[dim])
        # A size of one beside a larger batch is an argument that all requests share.
        return next((size for size in sizes if size != 1), sizes[0] if sizes else None)


def _told_apart(
    program: Program,
    nodes: Sequence[fx.Node],
    inputs: Sequence[FrameInput],
    examples: Sequence[Any],
) -> list[FrameInput]:
    """The inputs, with those results marked that do not hold one entry of each request.

    Where others do, that is what holds several of each; their sizes do not count. Where results are
    of different requests, it is what belongs to one alone.
    """
    requests, found = len(program.runtime.rows), list(inputs)
    by_rows = any(
        item.requests_dim is not None and example.shape[item.requests_dim] == requests
        for item, example in zip(inputs, examples, strict=True)
    )
    alone = {
        position: request
        for position, (item, example) in enumerate(zip(inputs, examples, strict=True))
        if item.kind == "result" and (request := program.only_request(example)) is not None
    }
    apart = len(set(alone.values())) > 1
    for position, (node, item, example) in enumerate(zip(nodes, inputs, examples, strict=True)):
        if item.role is not None and position in alone and apart:
            role = replace(item.role, dim=None, request=alone[position], requests=requests)
            found[position] = replace(item, role=role)
        elif item.counts and (of := size_source(node)) is not None:
            single = apart and program.only_request(of[0]) is not None
            found[position] = replace(
                item, counts=not single and not (by_rows and program.holds_several(of[0]))
            )
        elif item.kind == "result" and item.role is not None and by_rows:
            several = item.role.dim is not None and program.holds_several(example)
            found[position] = replace(item, role=replace(item.role, several=several))
    return found


def _counts(
    program: Program,
    node: fx.Node,
    arguments: Mapping[int, Role],
    known: Mapping[int, FrameInput],
) -> bool:
    """Whether a size is that of a dimension of requests; `known` tensors have none."""
    of = size_source(node)
    if of is None:
        return False
    tensor, dim = of
    role = arguments.get(id(tensor))
    if role is None and id(tensor) not in known:
        role = program.earlier_result(tensor)
    return role is not None and role.known and role.dim == dim and tensor.shape[dim] > 1


def wants_gradient(examples: Iterable[Any]) -> bool:
    """True where a frame's results want gradients, by the values of its inputs."""
    return torch.is_grad_enabled() and any(
        isinstance(item, Tensor) and item.requires_grad for item in examples
    )


def fake_value(node: fx.Node) -> Any:
    """The fake tensor (or symbol) that tracing recorded for `node`."""
    return node.meta.get("val")


def batch_symbols(frame: Frame) -> set[Any]:
    """The symbols (or ints) that are the number of requests, by contract, in this frame's graph.

    The slots' length (unless there is one per token), and the request dimension of every argument
    that has one; a size of one beside a larger batch is a shared argument, not a batch.

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
    if frame.duck_shaped and any(not isinstance(size, int) for size in found & others):
        raise ProvenanceError(
            "the graph cannot distinguish the number of requests from another size: it was "
            "captured outside lorafx.adapters, where torch.compile gives equal sizes one "
            "symbol"
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
