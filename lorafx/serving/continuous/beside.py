"""Calls of a model beside an engine that has it use eager attention over pages.

transformers switches a model with eager attention to one over pages for as long as an engine runs
it. Another call has no pages, and not even a mask for this attention. Calls take turns with steps,
so the model has its own attention for the length of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lorafx.serving.continuous.eager import EAGER
from lorafx.session.session import Session

T = TypeVar("T")


class BesideEngine:
    """Has the calls of one model, `session`'s, use the attention `own` while an engine runs."""

    def __init__(self, session: Session, own: str) -> None:
        self._session, self._own = session, own
        self._model: Any = session.program.model
        with session.lock:
            session.beside = self

    def __call__(self, function: Callable[[], T]) -> T:
        """What `function` returns. The session's lock is held."""
        if self._model.config._attn_implementation != EAGER:
            return function()  # inside of such a call, or the engine has ended
        self._model.set_attn_implementation(self._own)
        try:
            return function()
        finally:
            self._model.set_attn_implementation(EAGER)

    def end(self) -> None:
        """The engine has ended, or never ran: the model has its own attention again."""
        with self._session.lock:  # behind a call that is under way
            self._session.beside = None
            if self._model.config._attn_implementation == EAGER:
                self._model.set_attn_implementation(self._own)
