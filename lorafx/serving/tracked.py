"""The calls in which operators between graphs are tracked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lorafx.capture.tracking import Tracking
from lorafx.capture.weights_in_python import WeightUses
from lorafx.ownership.held import MOST_REQUESTS
from lorafx.ownership.memory import Memory
from lorafx.program.handover import held_argument
from lorafx.program.roles import tensor_leaves
from lorafx.session.session import Session

T = TypeVar("T")


def tracked(session: Session, action: Callable[[], T]) -> T:
    """What `action` returns, which runs the model. Where adapters are active, what Python computes
    between graphs is looked at: for weights that are used past their modules, and where that may be
    asked for, for owners.

    Raises:
        MatchError: the weight of a site was used past its module.
    """
    program, captured = session.program, len(session.backend.records)
    active = program.runtime.active
    uses = WeightUses(program) if active and program.batch.touched else None
    memory = _memory(session) if active else None
    try:
        if uses is None and memory is None:
            return action()
        result = Tracking(memory, uses).run(action)
        if uses is not None:
            uses.refuse()
        return result
    finally:
        if active:
            session.capturing = len(session.backend.records) != captured


def _memory(session: Session) -> Memory | None:
    """Where the owners are noted of what the running call computes; None where nobody asks: the
    batch is of one adapter, or the model in one graph, and calls have no graphs captured any more.
    """
    program = session.program
    call, rows = program.call, len(program.runtime.rows)
    mixed = not program.runtime.uniform and session.backend.several[0]
    wanted = session.asked.tokens is None and 1 < rows <= MOST_REQUESTS
    if call is None or call.roles is None or not wanted or not (mixed or session.capturing):
        return None
    call.tracked = True
    for name, value in call.named.items():
        for tensor in tensor_leaves(value):
            role = call.roles.role(name, tensor, call.named)
            call.memory.given(tensor, held_argument(role, tensor, rows))
    if mixed:
        call.memory.own(program.buffers())
    return call.memory
