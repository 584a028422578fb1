"""Which requests may be in the next step: those whose adapters fit into the slots together.

transformers' schedulers decide the order, and how many tokens there is room for. Of their
candidates only those are let through whose adapters have a slot in this step. Adapters that are in
a slot go first, since a change of slots costs a copy; one that was passed over for `PATIENCE` steps
goes before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from lorafx.errors import ConfigError, nearest
from lorafx.serving.continuous.requests import Ticket, ticket_of
from lorafx.session.session import Session

_SUFFIX = ", adapters within slots"

#: Steps for which an adapter may be passed over in favour of those that have a slot.
PATIENCE = 8


class SlotsPerStep:
    """Mixed into the class of a scheduler (`within_slots`).

    Attributes:
        session: of the model that is served.
    """

    session: Session

    def _process_candidates(
        self, candidates: list[RequestState], *args: Any, **kwargs: Any
    ) -> tuple[list[FutureRequestState], bool, bool, int, int]:
        ready = self._ready(candidates)
        scheduler: Any = super()
        result: tuple[list[FutureRequestState], bool, bool, int, int]
        result = scheduler._process_candidates(ready, *args, **kwargs)
        return result

    def _ready(self, candidates: Sequence[RequestState]) -> list[RequestState]:
        tickets = {id(state): ticket_of(state) for state in candidates}
        wanted: dict[str, int] = {}
        for ticket in dict.fromkeys(tickets.values()):
            name = self._name(ticket)
            if ticket is not None and name is not None:
                wanted[name] = max(wanted.get(name, 0), ticket.waited)
        chosen = self._chosen(wanted)
        ready = []
        for state in candidates:
            ticket = tickets[id(state)]
            name = self._name(ticket)
            if name is None or name in chosen:
                ready.append(state)
            if ticket is not None and name is not None:
                ticket.waited = 0 if name in chosen else ticket.waited + 1
                self.session.waits += name not in chosen
        return ready

    def _name(self, ticket: Ticket | None) -> str | None:
        return (
            None
            if ticket is None or ticket.hold is None
            else self.session.store.held_name(ticket.hold)
        )

    def _chosen(self, wanted: dict[str, int]) -> set[str]:
        """Of the adapters that are wanted, with the steps that each has waited, those that are
        served in this step."""
        room = self.session.store.max_adapters
        if len(wanted) <= room and not self.session.store.pinned:
            return set(wanted)
        resident, pinned = self.session.store.resident, self.session.store.pinned
        room -= len(pinned.difference(wanted))

        def first(name: str) -> tuple[bool, int, bool]:
            urgent = wanted[name] >= PATIENCE
            return not urgent, -wanted[name] if urgent else 0, name not in resident

        return set(_some(sorted(wanted, key=first), room))


def _some(names: Iterable[str], count: int) -> list[str]:
    return list(names)[: max(count, 0)]


def within_slots(scheduler_type: str) -> str:
    """The name of a scheduler in transformers' registry that keeps to the slots, and otherwise does
    what the one that is called `scheduler_type` does.

    Raises:
        ConfigError: there is none of this name.
    """
    cls = SCHEDULER_MAPPING.get(scheduler_type)
    if cls is None:
        raise ConfigError(
            f"transformers has no scheduler {scheduler_type!r}{nearest(scheduler_type, known())}; "
            f"there are {', '.join(known())}"
        )
    name = f"{scheduler_type}{_SUFFIX}"
    within: Any = type(cls.__name__, (SlotsPerStep, cls), {})
    SCHEDULER_MAPPING.setdefault(name, within)
    return name


def known() -> list[str]:
    """The names of transformers' own schedulers."""
    return [name for name in SCHEDULER_MAPPING if not name.endswith(_SUFFIX)]
