"""Each call that a graph serves also runs in eager mode, before it, and both answers are compared.

Eager mode answers what it can prove, or asks for a graph; all that it changed is undone. So every
model of the tests goes both roads, against the same oracle: the test's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lorafx.eager.following import NeedsGraph
from lorafx.errors import LorafxError, MatchError
from lorafx.runtime.beside.comparison import answer_of, bound_of, distance
from lorafx.runtime.call import Choice, ForwardCall
from lorafx.runtime.entry import Entry
from lorafx.runtime.session import Session
from lorafx.runtime.tiers import Tiers

#: The most calls of a kind, with the same adapters, that are compared.
_CALLS = 2

_by_graph = Entry.run_graph
_compared: WeakKeyDictionary[Session, dict[object, int]] = WeakKeyDictionary()
_switch = {"on": True}


@contextmanager
def one_road() -> Iterator[None]:
    """Inside the block calls are only run as they are asked for."""
    before = _switch["on"]
    _switch["on"] = False
    try:
        yield
    finally:
        _switch["on"] = before


class Raised:
    """The error of eager mode."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _run_graph(self: Entry, call: ForwardCall, conversion: Choice | None = None) -> Any:
    session = self.session
    by_graph = partial(_by_graph, self, call, conversion)
    if not _switch["on"] or self.tiers is not None or session.running.warming:
        return by_graph()
    own_passes = any(not isinstance(item, bool) for item in session.program.options.passes.values())
    if own_passes:  # which tests have do wrong on purpose
        return by_graph()
    if session.replays or not _is_due(call):
        return by_graph()
    read = partial(answer_of, call.kwargs, torch.get_rng_state())
    eager = _eagerly(call, read)
    try:
        result = by_graph()
    except MatchError as error:
        if isinstance(eager, list) and eager:
            raise AssertionError(f"eager mode answers what a graph refuses: {error}") from error
        raise
    if isinstance(eager, Raised) and not isinstance(eager.error, LorafxError):
        raise AssertionError(f"eager mode raises {eager.error!r}") from eager.error
    if isinstance(eager, list):
        apart = distance(eager, read(result), bound_of(session.program))
        assert apart <= 1, f"eager mode and the graph differ by {apart:.2g} times the bound"
    return result


def _is_due(call: ForwardCall) -> bool:
    session = call.session
    counts = _compared.setdefault(session, {})
    kind = _tiers_of(session).kind_of(call)
    key = id(kind), tuple(session.program.runtime.rows), session.counts.writes
    counts[key] = counts.get(key, 0) + 1
    return counts[key] <= _CALLS


def _tiers_of(session: Session) -> Tiers:
    # On the session, as its own are: in a table its program would keep it alive.
    tiers: Tiers = vars(session).setdefault("tiers_of_tests", None) or Tiers(session)
    session.tiers_of_tests = tiers  # type: ignore[attr-defined]
    return tiers


def _eagerly(call: ForwardCall, read: Any) -> Any:
    """The answer of eager mode; None if it asks for a graph."""
    try:
        return _tiers_of(call.session).look_eagerly(call, read)
    except NeedsGraph:
        return None
    except Exception as error:
        return Raised(error)


def install() -> None:
    """Have all calls of this process compared."""
    Entry.run_graph = _run_graph  # type: ignore[method-assign]
