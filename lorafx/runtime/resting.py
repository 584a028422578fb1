"""Layers that run outside of a session's compiled forwards, where nothing adds their deltas."""

from __future__ import annotations

from lorafx.adapter_store.names import BASE
from lorafx.errors import BatchError, MatchError
from lorafx.program.stack import refuse_called_slips
from lorafx.runtime.session import Session

_WAY = "the names to what lorafx.compile returned: cm(..., adapter_names=[...])"


class Resting:
    """Checks that marks make in eager mode (`Runtime.resting`), where a layer runs outside of the
    session's compiled forwards and nothing adds its delta."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def refuse(self, path: str, layer: str) -> None:
        """Refuse to run the layer at `path` if an adapter in use changes it.

        Raises:
            MatchError: an adapter of this thread's call, or the default, changes it.
            BatchError: an adapter of another thread's call changes it.
        """
        session = self._session
        running = session.running
        if running.entries or running.warming or session.base.merged is not None:
            return
        if any(other.running.entries for other in session.neighbours):
            return
        if (running.here or not running.depth) and session.returned_from == path:
            session.returned_from = None
            return
        for name in adapters_in_use(session):
            if path not in session.store[name].sites:
                continue
            refuse_elsewhere(session)  # where the adapter is of another thread's call
            reason = (
                f"{name!r} is the default that set_adapter chose"
                if session.requests.names == (session.default,)
                else f"adapter {name!r} was requested by this call"
            )
            raise MatchError(
                f"{layer} runs outside the compiled model's own calls, where nothing adds "
                f"its delta, but {reason}. Call the compiled model or a method of its class; "
                "after set_adapter(None), parts of the model that are called directly run "
                "as the base"
            )

    def refuse_slips(self) -> None:
        """As `refuse_called_slips`, unless a compiled forward is running."""
        if not self._session.running.entries:
            model = self._session.program.model
            refuse_called_slips(lambda module: module is model, _WAY)

    def refuse_elsewhere(self) -> None:
        """As the function of this name."""
        refuse_elsewhere(self._session)


def refuse_elsewhere(session: Session) -> None:
    """Raise BatchError if another thread is in a call, whose adapters this thread would get."""
    running = session.running
    if running.depth and not running.here:
        raise BatchError(
            f"this {type(session.program.model).__name__}, or a part of it, is called by itself "
            "while another thread is in a call of the compiled model, whose adapters it would get. "
            "Call the compiled model, which waits; adapter_names=[None, ...] is the base there"
        )


def adapters_in_use(session: Session) -> list[str]:
    """The names of the adapters that the running call, or else the default, uses."""
    return [name for name in dict.fromkeys(session.requests.names) if name not in (None, BASE)]
