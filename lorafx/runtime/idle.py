"""Layers of a compiled model that run outside the calls of its entries get no adapter.

Such a layer (`cm.lm_head(h)`, `cm.model(x)`, parts that a `generate` of the model's own calls
directly) runs without slots. Where the adapters that are wanted at that moment change it, its mark
raises; where they do not, the base's answer is right. Marks ask in eager mode only, so this is in
no graph.
"""

from __future__ import annotations

from lorafx.adapter_store.names import BASE
from lorafx.errors import BatchError, MatchError
from lorafx.program.stack import refuse_called_slips
from lorafx.runtime.session import Session

_WAY = "the names to what lorafx.compile returned: cm(..., adapter_names=[...])"


class Resting:
    """What the marks of a compiled model ask in eager mode (`Runtime.resting`)."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def refuse(self, path: str, layer: str) -> None:
        """Refuse that the layer at `path` runs, where an adapter that is wanted changes it.

        Raises:
            MatchError: it does.
            BatchError: it is wanted by a call of another thread, between two of its forwards.
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
        for name in wanted(session):
            if path not in session.store[name].sites:
                continue
            refuse_elsewhere(session)  # it is the call of another thread that wants it
            reason = (
                f"{name!r} is the default that set_adapter chose"
                if session.asked.names == (session.default,)
                else f"adapter {name!r} was requested by this call"
            )
            raise MatchError(
                f"{layer} runs outside the compiled model's own calls, where nothing adds "
                f"its delta, but {reason}. Call the compiled model or a method of its class; "
                "after set_adapter(None), parts of the model that are called directly run "
                "as the base"
            )

    def refuse_slips(self) -> None:
        """As `refuse_called_slips`, of a call that is none of the compiled model's."""
        if not self._session.running.entries:
            model = self._session.program.model
            refuse_called_slips(lambda module: module is model, _WAY)

    def refuse_elsewhere(self) -> None:
        """As the function of this name: with an adapter active, the model itself, called on another
        thread, would get those of the call that is running."""
        refuse_elsewhere(self._session)


def refuse_elsewhere(session: Session) -> None:
    """Raise BatchError where a part of the model runs while another thread is in a call."""
    running = session.running
    if running.depth and not running.here:
        raise BatchError(
            f"this {type(session.program.model).__name__}, or a part of it, is called by itself "
            "while another thread is in a call of the compiled model, whose adapters it would get. "
            "Call the compiled model, which waits; adapter_names=[None, ...] is the base there"
        )


def wanted(session: Session) -> list[str]:
    """The adapters that the running call names, or the default where it names none."""
    return [name for name in dict.fromkeys(session.asked.names) if name not in (None, BASE)]
