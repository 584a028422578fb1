"""The executable of a frame: the compiled graph behind the checks of each call.

    arguments → checks of this batch → lookup of `match`'s inputs → graph → results noted

An executable keeps nothing of a layer or model: it asks for the program (`ProgramLookup`), and
finds banks by the weight at their position.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.checks import Checks
from lorafx.capture.tracking import Tracking, looks, untracked
from lorafx.capture.verify import NumericCheck
from lorafx.errors import CaptureError, LorafxError, MatchError
from lorafx.model.extras import EXTRAS
from lorafx.ownership.memory import SHARED, Alone
from lorafx.program.frame import SLOTS
from lorafx.program.program import Program
from lorafx.program.row_handoff import OfList, Rows
from lorafx.program.stack import calling_modules

#: The program that a graph serves. Dynamo keeps executables among a module's globals.
ProgramLookup = weakref.ref[Program]

#: Sizes, strides and dtype of a bank's tensor.
BankLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def checked(
    checks: Checks, owner: ProgramLookup, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The graph with checks of the batch and of its inputs, and with its results noted."""

    def run(*arguments: Any) -> Any:
        program = owner()
        if program is None:
            return compiled(*arguments)
        return untracked(partial(_run, program, arguments))

    def _run(program: Program, arguments: Sequence[Any], tracking: Tracking | None) -> Any:
        call, handover = program.call, checks.handover
        handed = call is not None and (program.in_pieces or handover.fresh)
        rows = checks.rows(program, arguments) if handed else None
        if checks.conditional:
            checks.check(program, arguments, alone=isinstance(rows, Alone))
        if call is None or not handed:
            return compiled(*arguments)
        if rows is None and not program.runtime.uniform:
            checks.refuse_changed(program, arguments)
        noting = tracking is not None and tracking.memory is not None
        looked_at = handover.seen and noting
        slots = _slots(program, checks, arguments, rows)
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


def _slots(
    program: Program, checks: Checks, arguments: Sequence[Any], rows: Rows | None
) -> Tensor | None:
    """The slots of a graph's rows, where they are not those of the batch."""
    slots, count = program.runtime.slots, checks.row_count(arguments)
    if isinstance(rows, OfList) and not rows.in_order and not program.runtime.uniform:
        return slots[list(rows.owners)]
    request = rows.request if isinstance(rows, Alone) else 0
    if isinstance(rows, Alone) and not program.runtime.uniform:
        return slots[request].expand(count or slots.shape[0]).clone()
    if count is not None and count != slots.shape[0]:  # as many as generated code expects
        return slots[request].expand(count).clone()
    return None


def looked_at(
    compiled: Callable[[list[Any]], Any], operators: fx.GraphModule
) -> Callable[[list[Any]], Any]:
    """The graph, run operator by operator while Python's computations are tracked."""

    def run(arguments: list[Any]) -> Any:
        return operators.forward(*arguments) if looks() else compiled(arguments)

    return run


def with_lookups(
    checks: Checks,
    owner: ProgramLookup,
    compiled: Callable[[list[Any]], Any],
    extra: Sequence[tuple[int, int, str]],
    banks: Sequence[BankLayout | None],
    numeric: NumericCheck | None = None,
) -> Callable[..., Any]:
    """The graph with the inputs added by passes, in AOTAutograd's boxed convention."""
    nulls: dict[int, Tensor] = {}
    rooms = frozenset(extra)

    def run(arguments: list[Any]) -> Any:
        program = owner()
        if program is not None:
            if checks.inside:
                _check_callers(program, arguments, checks)
            arguments.extend(_looked_up(program, arguments, extra, banks, rooms, nulls))
            if numeric is not None and numeric.stages:
                numeric.run(arguments, mixed=not program.runtime.uniform)
        return compiled(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def refusing(error: LorafxError) -> Callable[..., Any]:
    """An executable that raises `error` at run time, which Dynamo would wrap in compilation."""
    kind, text = type(error), str(error)

    def run(*arguments: Any) -> Any:
        raise kind(text)

    return run


def for_base(checks: Checks, owner: ProgramLookup, base: Callable[..., Any]) -> Callable[..., Any]:
    if not checks.plain:
        return base  # only calls of this kind reach it

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


def _looked_up(
    program: Program,
    arguments: Sequence[Any],
    extra: Sequence[tuple[int, int, str]],
    banks: Sequence[BankLayout | None],
    rooms: frozenset[tuple[int, int, str]],
    nulls: dict[int, Tensor],
) -> list[Any]:
    """The inputs added by passes; banks are found by weight, `nulls` of rank zero for a weight
    without site.

    Raises:
        CaptureError: a bank's layout differs from the captured layer's, or lacks room.
        ReplacedModuleError: the layer's module replaces one with LoRA.
    """
    fixed = program.options.lowering != "reference"
    found: list[Any] = []
    for number, ((position, index, name), layout) in enumerate(zip(extra, banks, strict=True)):
        if layout is None:
            slots = program.runtime.graph_slots
            found.append(slots if name == SLOTS else slots[:1])
            continue
        site = program.site_of_weight(arguments[position], index)
        bank = program.bank_of_weight(arguments[position], index)
        if site is None or bank is None:
            program.refuse_missing(program.batch.touched)
            if number not in nulls:
                nulls[number] = _zeros(layout, program.runtime.device)
            found.append(nulls[number])
            continue
        for kind in EXTRAS.values():
            room = kind.room
            if (getattr(bank, room) is not None) != ((position, index, room) in rooms):
                raise CaptureError(
                    f"{site.path} shares a graph with another layer of its class, and only one of "
                    f"the two has room for {kind.what}; give both models, or all such layers, "
                    f"LoraConfig({kind.setting}), or neither"
                )
        value = getattr(bank, name)
        if fixed and value.stride() != layout[1]:
            raise CaptureError(
                f"{site.path} shares a graph with a layer of the same class in which other "
                "modules carry LoRA; name the same modules by target_modules in all layers "
                "of that class"
            )
        found.append(value)
    return found


def _zeros(layout: BankLayout, device: torch.device) -> Tensor:
    shape, strides, dtype = layout
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # Gaps between the numbers are zeros, too.
    return torch.zeros(reach + 1, dtype=dtype, device=device).as_strided(shape, strides)
