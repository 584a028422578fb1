"""In which calls what Python computes between graphs is tracked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorafx.capture.handover import held_argument
from lorafx.capture.tracking import Tracking
from lorafx.ownership.held import MOST_REQUESTS
from lorafx.serving.roles import tensor_leaves
from lorafx.serving.session import Session


@contextmanager
def tracked(session: Session) -> Iterator[None]:
    """Inside, the owners of what Python computes between graphs are kept, where that may be asked
    for: the batch mixes adapters and the model is in several graphs, or calls still have graphs
    captured.
    """
    program, captured = session.program, len(session.backend.records)
    call, active, rows = program.call, program.runtime.active, len(program.runtime.rows)
    mixed = not program.runtime.uniform and session.backend.several[0]
    wanted = active and session.tokens is None and 1 < rows <= MOST_REQUESTS
    try:
        if call is None or call.roles is None or not wanted or not (mixed or session.capturing):
            yield
            return
        call.tracked = True
        for name, value in call.named.items():
            for tensor in tensor_leaves(value):
                role = call.roles.role(name, tensor)
                call.memory.given(tensor, held_argument(role, tensor, rows))
        with Tracking(call.memory):
            yield
    finally:
        if active:
            session.capturing = len(session.backend.records) != captured
