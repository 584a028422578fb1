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

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.checks import Checks
from lorafx.capture.driver import NumericCheck
from lorafx.eager.following import Following, owners_are_noted, running, unfollowed
from lorafx.errors import CaptureError, LorafxError, MatchError, ProvenanceError
from lorafx.model.extras import EXTRAS
from lorafx.model.runtime import Runtime
from lorafx.ownership.labels import One
from lorafx.ownership.real_labels import SHARED
from lorafx.program.frame import GATES, ONE_SLOT, SLOTS
from lorafx.program.program import Program
from lorafx.program.row_handoff import OfList, Rows
from lorafx.program.stack import calling_modules

#: The program that a graph serves, weakly: Dynamo keeps executables among a module's globals.
ProgramLookup = weakref.ref[Program]

#: Sizes, strides and dtype of a bank's tensor.
BankLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A graph from the lowering, in AOTAutograd's boxed convention, and the inputs that passes
    added to it.

    Attributes:
        extra, banks: (weight's position, site's index, name) and layout of each added input.
        whole: whether `run` is all of it; else it holds another graph, for tracked calls.
    """

    run: Callable[[list[Any]], Any]
    extra: Sequence[tuple[int, int, str]] = ()
    banks: Sequence[BankLayout | None] = ()
    whole: bool = True


def checked(
    checks: Checks, owner: ProgramLookup, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The graph behind the checks of its batch and inputs; owners of its results are noted."""

    def run(*arguments: Any) -> Any:
        program = owner()
        if program is None:
            return compiled(*arguments)
        if running() is not None:
            return unfollowed(partial(_run, program, arguments))
        if _follows_rows(program):
            return _run(program, arguments, None)
        if checks.conditional:
            checks.check(program, arguments)
        return compiled(*arguments)

    def _follows_rows(program: Program) -> bool:
        return program.call is not None and (program.in_pieces or checks.handover.fresh)

    def _run(program: Program, arguments: Sequence[Any], tracking: Following | None) -> Any:
        call, handover, follows_rows = program.call, checks.handover, _follows_rows(program)
        rows = checks.rows(program, arguments) if follows_rows else None
        if checks.conditional:
            checks.check(program, arguments, alone=isinstance(rows, One))
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
    if checks.per_token:
        return None
    slots, count = program.runtime.slots, checks.row_count(arguments)
    if isinstance(rows, OfList) and not rows.in_order and not program.runtime.uniform:
        return slots[list(rows.owners)]
    request = rows.request if isinstance(rows, One) else 0
    if isinstance(rows, One) and not program.runtime.uniform:
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
    lowered: Lowered,
    numeric: NumericCheck | None = None,
) -> Callable[..., Any]:
    """The graph, called with the inputs that passes added, in AOTAutograd's boxed convention."""
    zeros: dict[int, Tensor] = {}
    names = frozenset(lowered.extra)

    def run(arguments: list[Any]) -> Any:
        program = owner()
        if program is not None:
            if checks.inside:
                _check_callers(program, arguments, checks)
            arguments.extend(_added_inputs(program, arguments, lowered, names, zeros))
            if numeric is not None and numeric.stages:
                numeric.run(arguments, mixed=not program.runtime.uniform)
        return lowered.run(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def refusing(error: LorafxError) -> Callable[..., Any]:
    """An executable that raises `error` when called; Dynamo would wrap one raised earlier."""
    kind, text, settings = type(error), str(error), error.settings

    def run(*arguments: Any) -> Any:
        raise kind(text).naming(*settings)

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
    lowered: Lowered,
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
    for number, ((position, index, name), layout) in enumerate(
        zip(lowered.extra, lowered.banks, strict=True)
    ):
        if layout is None:
            inputs.append(_slots_input(program.runtime, name))
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


def _slots_input(runtime: Runtime, name: str) -> Tensor:
    if name in (SLOTS, ONE_SLOT):
        return runtime.graph_slots if name == SLOTS else runtime.graph_slots[:1]
    assert runtime.gates is not None
    if runtime.graph_slots is not runtime.slots:
        raise ProvenanceError(
            "this model is several graphs, and one of them has other rows than the batch: which "
            "gates they have is not known; name one adapter or sum for each row"
        )
    value: Tensor = getattr(runtime.gates, GATES[name])
    return value


def _zeros(layout: BankLayout, device: torch.device) -> Tensor:
    shape, strides, dtype = layout
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # The gaps that the strides leave are zeros, too.
    return torch.zeros(last + 1, dtype=dtype, device=device).as_strided(shape, strides)
