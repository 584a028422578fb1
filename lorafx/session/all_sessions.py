"""All sessions of this process, by which models with common weights find each other, and by which a
forked child frees the locks."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafx.session.session import Session

#: Also those that serve no more: a child process frees their locks.
_SESSIONS: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def add(session: Session) -> None:
    """Have `sessions` find it, as long as somebody keeps it."""
    _SESSIONS[id(session)] = session


def sessions() -> list[Session]:
    """Those that serve a model: compiled ones, and marked ones that their users compile."""
    return [session for session in _all() if session.serves]


def _all() -> list[Session]:
    # A list at once: while somebody walked over it, another thread might change the dictionary.
    found = (reference() for reference in _SESSIONS.valuerefs())
    return [session for session in found if session is not None]


def _after_fork() -> None:
    every = _all()
    shared = {id(session.locks): session.locks for session in every}
    lost = {key: locks.after_fork() for key, locks in shared.items()}
    for session in every:
        session.after_fork(lost=lost[id(session.locks)])


os.register_at_fork(after_in_child=_after_fork)
