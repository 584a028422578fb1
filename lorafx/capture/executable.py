"""The executable of a frame: the compiled graph behind the checks of each call.

    arguments → checks of the batch → lookup of the inputs that passes added → graph → owners noted

An executable holds no reference to a layer or model: it looks up the program (`ProgramLookup`),
and finds each bank by the weight that it is called with.

Another process can rebuild it from its parts:

    checked( AOTAutograd's wrappers( with_lookups( the lowered graph ) ) )

AOTAutograd returns a single function, so its wrappers (of views, aliases, input mutations) are
recorded while it works.
"""

from __future__ import annotations

import json
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache, partial
from importlib import metadata
from typing import Any, cast

import torch
from torch import Tensor, fx

from lorafx.capture.checks import Checks
from lorafx.capture.driver import NumericCheck
from lorafx.capture.record import GraphRecord
from lorafx.eager.following import Following, owners_are_noted, unfollowed
from lorafx.errors import CaptureError, LorafxError, MatchError
from lorafx.kernels.cpu.delta_kernels import builds_noted
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.model.extras import EXTRAS
from lorafx.op_arguments import TRACED_WRITE
from lorafx.ownership.real_labels import SHARED, Alone
from lorafx.program.frame import SLOTS, Frame
from lorafx.program.program import Program
from lorafx.program.row_handoff import OfList, Rows
from lorafx.program.stack import calling_modules
from lorafx.torch_internals.compat import traced_anew
from lorafx.torch_internals.frames import outside_of_frames
from lorafx.torch_internals.graph_parts import HigherOrderOperator, OpOverload, OpOverloadPacket

#: The program that a graph serves, weakly: Dynamo keeps executables among a module's globals.
ProgramLookup = weakref.ref[Program]

#: Sizes, strides and dtype of a bank's tensor.
BankLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def checked(
    checks: Checks, owner: ProgramLookup, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The graph behind the checks of its batch and inputs; owners of its results are noted."""

    def run(*arguments: Any) -> Any:
        program = owner()
        if program is None:
            return compiled(*arguments)
        return unfollowed(partial(_run, program, arguments))

    def _run(program: Program, arguments: Sequence[Any], tracking: Following | None) -> Any:
        call, handover = program.call, checks.handover
        follows_rows = call is not None and (program.in_pieces or handover.fresh)
        rows = checks.rows(program, arguments) if follows_rows else None
        if checks.conditional:
            checks.check(program, arguments, alone=isinstance(rows, Alone))
        if call is None or not follows_rows:
            return compiled(*arguments)
        if rows is None and not program.runtime.uniform:
            checks.refuse_changed(program, arguments)
        notes_owners = tracking is not None and tracking.memory is not None
        looked_at = handover.seen and notes_owners
        slots = _slots_of_rows(program, checks, arguments, rows)
        if tracking is not None and looked_at:
            results = tracking.in_graph(partial(compiled, *arguments))
        else:
            with program.runtime.rows_of(slots):
                results = compiled(*arguments)
        handover.note(call.memory, arguments, results, rows, looked_at=looked_at)
        if handover.constant:
            unwritten, look = program.versions.unwritten, call.memory.look
            program.remembered.keep(
                results[position]
                for position, inputs in handover.constant.items()
                if all(
                    unwritten(item) and look(item) is SHARED
                    for item in map(arguments.__getitem__, inputs)
                )
            )
        handover.fresh = False
        return results

    return run


def _slots_of_rows(
    program: Program, checks: Checks, arguments: Sequence[Any], rows: Rows | None
) -> Tensor | None:
    """The slots of a graph's rows, or None where they are those of the batch."""
    slots, count = program.runtime.slots, checks.row_count(arguments)
    if isinstance(rows, OfList) and not rows.in_order and not program.runtime.uniform:
        return slots[list(rows.owners)]
    request = rows.request if isinstance(rows, Alone) else 0
    if isinstance(rows, Alone) and not program.runtime.uniform:
        return slots[request].expand(count or slots.shape[0]).clone()
    if count is not None and count != slots.shape[0]:  # generated code expects `count`
        return slots[request].expand(count).clone()
    return None


def by_operator_if_tracked(
    compiled: Callable[[list[Any]], Any], operators: fx.GraphModule
) -> Callable[[list[Any]], Any]:
    """The graph, run operator by operator while Python's computations are tracked."""

    def run(arguments: list[Any]) -> Any:
        return operators.forward(*arguments) if owners_are_noted() else compiled(arguments)

    return run


def with_lookups(
    checks: Checks,
    owner: ProgramLookup,
    compiled: Callable[[list[Any]], Any],
    extra: Sequence[tuple[int, int, str]],
    banks: Sequence[BankLayout | None],
    numeric: NumericCheck | None = None,
) -> Callable[..., Any]:
    """The graph, called with the inputs that passes added, in AOTAutograd's boxed convention."""
    zeros: dict[int, Tensor] = {}
    names = frozenset(extra)

    def run(arguments: list[Any]) -> Any:
        program = owner()
        if program is not None:
            if checks.inside:
                _check_callers(program, arguments, checks)
            arguments.extend(_added_inputs(program, arguments, extra, banks, names, zeros))
            if numeric is not None and numeric.stages:
                numeric.run(arguments, mixed=not program.runtime.uniform)
        return compiled(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def refusing(error: LorafxError) -> Callable[..., Any]:
    """An executable that raises `error` when called; Dynamo would wrap one raised earlier."""
    kind, text = type(error), str(error)

    def run(*arguments: Any) -> Any:
        raise kind(text)

    return run


def for_base(checks: Checks, owner: ProgramLookup, base: Callable[..., Any]) -> Callable[..., Any]:
    if not checks.plain:
        return base  # only calls without adapters reach it

    def run(*arguments: Any) -> Any:
        program = owner()
        if program is not None and program.runtime.active:
            checks.check(program, arguments)
        return base(*arguments)

    return run


def _check_callers(program: Program, arguments: Sequence[Any], checks: Checks) -> None:
    """Raise MatchError where unmarked uses moved into or out of their modules' calls."""
    callers = calling_modules()
    for (position, index), expected in checks.inside.items():
        site = program.site_of_weight(arguments[position], index)
        if site is None or (id(site.module) in callers) == expected:
            continue
        if program.is_touched(site):
            raise MatchError(
                f"{site.path}: its forward is called both directly and through its module, "
                "in graphs that a graph break separates; always call the module, or use "
                "exclude_modules"
            )


def _added_inputs(
    program: Program,
    arguments: Sequence[Any],
    extra: Sequence[tuple[int, int, str]],
    banks: Sequence[BankLayout | None],
    names: frozenset[tuple[int, int, str]],
    zeros: dict[int, Tensor],
) -> list[Any]:
    """The inputs that passes added: a bank is that of its weight, or zeros, kept in `zeros`, for a
    weight that is no site's.

    Raises:
        CaptureError: a bank's layout or room for extras differs from the captured layer's.
        ReplacedModuleError: a touched site's module was replaced by this layer's.
    """
    strides_are_fixed = program.options.lowering != "reference"
    inputs: list[Any] = []
    for number, ((position, index, name), layout) in enumerate(zip(extra, banks, strict=True)):
        if layout is None:
            slots = program.runtime.graph_slots
            inputs.append(slots if name == SLOTS else slots[:1])
            continue
        site = program.site_of_weight(arguments[position], index)
        bank = program.bank_of_weight(arguments[position], index)
        if site is None or bank is None:
            program.refuse_missing(program.batch.touched)
            if number not in zeros:
                zeros[number] = _zeros(layout, program.runtime.device)
            inputs.append(zeros[number])
            continue
        for kind in EXTRAS.values():
            room = kind.room
            if (getattr(bank, room) is not None) != ((position, index, room) in names):
                raise CaptureError(
                    f"{site.path} shares a graph with another layer of its class, and only one of "
                    f"the two has room for {kind.what}; give both models, or all such layers, "
                    f"LoraConfig({kind.setting}), or neither"
                )
        value = getattr(bank, name)
        if strides_are_fixed and value.stride() != layout[1]:
            raise CaptureError(
                f"{site.path} shares a graph with a layer of the same class in which other "
                "modules carry LoRA; name the same modules by target_modules in all layers "
                "of that class"
            )
        inputs.append(value)
    return inputs


def _zeros(layout: BankLayout, device: torch.device) -> Tensor:
    shape, strides, dtype = layout
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # The gaps that the strides leave are zeros, too.
    return torch.zeros(last + 1, dtype=dtype, device=device).as_strided(shape, strides)


_KNOWN_NAMESPACES = ("aten", "prims", "prim", "lorafx", "inductor")
_KNOWN_HIGHER_ORDER = (torch.ops.higher_order.invoke_subgraph,)


@dataclass
class Wrappers:
    """The wrappers that AOTAutograd puts around a graph without gradients, and their settings;
    `subclasses` says which inputs are tensors that wrap others."""

    metadata: Any
    wrappers: list[Any]
    config: Any
    subclasses: Any = None

    def around(self, compiled: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        """AOTAutograd's function around `compiled`, a graph in the boxed convention."""
        from lorafx.torch_internals.saved_graphs import BundledAOTAutogradResult

        # The other fields are only read when torch itself loads the graph.
        values = dict.fromkeys(item.name for item in fields(BundledAOTAutogradResult))
        values |= {"forward_time_taken_ns": 0, "backward_time_taken_ns": 0}
        values |= {"runtime_metadata": self.metadata, "dispatch_wrappers": self.wrappers}
        values |= {"sanitized_aot_config": self.config, "indices_of_inps_to_detach": []}
        values |= {"maybe_subclass_meta": self.subclasses}
        result: Any = cast(Any, BundledAOTAutogradResult)(**values)
        with outside_of_frames():
            run = result._apply_runtime_wrappers(compiled, None, False, self.config)
        return lambda *arguments: run(list(arguments))


@contextmanager
def collecting_parts(parts: Parts, gm: fx.GraphModule) -> Iterator[None]:
    """Collect in `parts` what AOTAutograd and the lowering make of Dynamo's graph in the block."""
    from lorafx.torch_internals.saved_graphs import inference_info_noted

    parts.foreign = foreign_operators(gm)
    # Without traced_anew, torch's cache may return a function that has no visible parts.
    with builds_noted() as kernels, inference_info_noted() as infos, traced_anew():
        yield
    parts.kernels = kernels
    if infos:
        config, metadata, subclasses, compiled, *_, wrappers = infos[-1]
        parts.lowered = parts.lowered or compiled
        with suppress(AttributeError, TypeError, ValueError):  # the graph is not saved then
            parts.wrappers = Wrappers(metadata, wrappers, config.to_cacheable(), subclasses)


@dataclass
class Parts:
    """The parts of an executable of calls with adapters, or without (`base`).

    Attributes:
        lowered: the graph from the lowering, in the boxed convention.
        kernels: the generated C++ kernels that it calls, with their ids.
        extra, banks: (weight's position, site's index, name) and layout of inputs added by passes.
        foreign: operators of the graph that are neither torch's nor lorafx's.
        whole: whether the executable can be rebuilt from these parts alone.
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
        boxed = with_lookups(self.checks, owner, lowered, self.extra, self.banks)
        return checked(self.checks, owner, self.wrappers.around(boxed))


def foreign_operators(gm: fx.GraphModule) -> list[str]:
    """Names of operators and functions in a graph whose code a saved graph's key does not cover: it
    has torch's, lorafx's, and the versions of installed packages, which name their operators after
    themselves."""
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
                namespace = str(target).partition(".")[0]
                known = namespace in _KNOWN_NAMESPACES or _is_installed(namespace)
            elif isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
                known = True  # written in C, by an installed package
            else:
                home = str(getattr(target, "__module__", "")).partition(".")[0]
                known = home in ("_operator", "math", "builtins", "torch")
            if not known:
                found.add(str(target))
    return sorted(found)


@cache
def _is_installed(package: str) -> bool:
    """Whether pip has installed a package, whose files then change with its version only."""
    names = metadata.packages_distributions().get(package, ())
    origins = [metadata.distribution(name).read_text("direct_url.json") for name in names]
    folders = [json.loads(origin or "{}").get("dir_info", {}) for origin in origins]
    return bool(folders) and not any(folder.get("editable") for folder in folders)


@dataclass
class Captured:
    """A graph that the backend compiles; `sources` are Dynamo's sources of its inputs."""

    record: GraphRecord
    frame: Frame
    sources: Sequence[Any]
    parts: Parts
