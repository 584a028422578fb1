"""The parts of an executable, from which another process can rebuild it.

    bound( looked up( checked( AOTAutograd's wrappers( with_lookups( the lowered graph ) ) ) ) )

AOTAutograd returns a single function; its wrappers (views, aliases, input mutations) are noted
while it works.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from lorafx.capture.checks import Checks
from lorafx.capture.executable import BankLayout, checked, for_base, with_lookups
from lorafx.kernels.cpu.delta_kernels import builds_noted
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.op_arguments import TRACED_WRITE
from lorafx.torch_internals.compat import traced_anew
from lorafx.torch_internals.frames import outside_of_frames
from lorafx.torch_internals.graph_parts import HigherOrderOperator, OpOverload, OpOverloadPacket

if TYPE_CHECKING:
    from lorafx.capture.record import GraphRecord
    from lorafx.program.frame import Frame
    from lorafx.program.program import Program

_KNOWN_NAMESPACES = ("aten", "prims", "prim", "lorafx", "inductor")
_KNOWN_HIGHER_ORDER = (torch.ops.higher_order.invoke_subgraph,)


@dataclass
class Wrappers:
    """AOTAutograd's wrappers of a graph without gradients, with their metadata and settings."""

    metadata: Any
    wrappers: list[Any]
    config: Any

    def around(self, compiled: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        """AOTAutograd's function around `compiled`, a graph in the boxed convention."""
        from lorafx.torch_internals.saved_graphs import BundledAOTAutogradResult

        # Other fields are only read when torch itself loads the graph.
        values = dict.fromkeys(item.name for item in fields(BundledAOTAutogradResult))
        values |= {"forward_time_taken_ns": 0, "backward_time_taken_ns": 0}
        values |= {"runtime_metadata": self.metadata, "dispatch_wrappers": self.wrappers}
        values |= {"sanitized_aot_config": self.config, "indices_of_inps_to_detach": []}
        result: Any = cast(Any, BundledAOTAutogradResult)(**values)
        with outside_of_frames():
            run = result._apply_runtime_wrappers(compiled, None, False, self.config)

        def unboxed(*arguments: Any) -> Any:
            return run(list(arguments))

        return unboxed


@contextmanager
def noted(parts: Parts, gm: fx.GraphModule) -> Iterator[None]:
    """Note in `parts` what AOTAutograd and the lowering make of Dynamo's graph in the block."""
    from lorafx.torch_internals.saved_graphs import inference_info_noted

    parts.foreign = foreign_operators(gm)
    # torch's cache would return an opaque function.
    with builds_noted() as kernels, inference_info_noted() as told, traced_anew():
        yield
    parts.kernels = kernels
    if told:
        config, metadata, subclasses, *rest = told[-1]
        parts.lowered = parts.lowered or rest[0]
        if subclasses is None:
            with suppress(AttributeError, TypeError, ValueError):  # it is not saved then
                parts.wrappers = Wrappers(metadata, rest[-1], config.to_cacheable())


@dataclass
class Parts:
    """The parts of an executable of calls with adapters, or without (`base`).

    Attributes:
        lowered: the graph from the lowering, in the boxed convention.
        kernels: its generated C++ kernels, with their ids.
        extra, banks: as in `with_lookups`.
        foreign: operators of the graph that are neither torch's nor lorafx's.
        whole: whether these parts are complete.
    """

    checks: Checks
    base: bool = False
    lowered: Any = None
    kernels: dict[DeltaSpec, int] = field(default_factory=dict)
    extra: list[tuple[int, int, str]] = field(default_factory=list)
    banks: list[BankLayout | None] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    wrappers: Wrappers | None = None
    whole: bool = True

    def executable(
        self, program: Program, lowered: Callable[[list[Any]], Any]
    ) -> Callable[..., Any]:
        assert self.wrappers is not None
        owner = weakref.ref(program)
        if self.base:
            return for_base(self.checks, owner, self.wrappers.around(lowered))
        found = with_lookups(self.checks, owner, lowered, self.extra, self.banks)
        return checked(self.checks, owner, self.wrappers.around(found))


def foreign_operators(gm: fx.GraphModule) -> list[str]:
    """Operators unknown to torch and lorafx, whose code is not compared. Dynamo's graph contains
    functions left untraced, and operators that are decomposed later."""
    found = set()
    for module in gm.modules():
        nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
        for node in nodes:
            if node.op != "call_function":
                continue
            target: Any = node.args[0] if node.target is TRACED_WRITE else node.target
            if isinstance(target, HigherOrderOperator):
                known = target in _KNOWN_HIGHER_ORDER
            elif isinstance(target, (OpOverload, OpOverloadPacket)):
                known = str(target).partition(".")[0] in _KNOWN_NAMESPACES
            elif isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
                known = True  # of C, in installed packages
            else:
                home = str(getattr(target, "__module__", "")).partition(".")[0]
                known = home in ("_operator", "math", "builtins", "torch")
            if not known:
                found.add(str(target))
    return sorted(found)


@dataclass
class Captured:
    """A graph of the backend, with the `sources` of its inputs in Dynamo."""

    record: GraphRecord
    frame: Frame
    sources: Sequence[Any]
    parts: Parts
