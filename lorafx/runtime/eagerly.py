"""The model's own forward with marks, for calls that no graph serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lorafx.capture.tracking import Tracking, WeightUses
from lorafx.runtime.session import Session


class NeedsGraph(Exception):
    """The model cannot serve this call eagerly; nothing has changed."""


def run_eagerly(
    session: Session, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    program, runtime = session.program, session.program.runtime
    if session.requests.tokens is not None:
        raise NeedsGraph("each token has its own slot")
    run = partial(target, *args, **kwargs)
    if all(row < 0 for row in runtime.rows):
        active = runtime.active
        try:
            runtime.active = False
            return run()
        finally:
            runtime.active = active
    if not runtime.uniform:
        raise NeedsGraph("the rows of the batch use different adapters")
    uses = WeightUses(program) if program.batch.touched else None
    result = Tracking(None, uses).run(run)
    if uses is not None:
        uses.refuse()
    return result
