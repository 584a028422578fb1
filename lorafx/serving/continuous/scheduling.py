"""Which requests may be in the next step: those whose adapters fit into the slots together.

transformers' schedulers decide the order, and how many tokens there is room for. Of their
candidates only those are let through whose adapters have a slot in this step. Adapters that are in
a slot go first, since a change of slots costs a copy; one that was passed over for `PATIENCE` steps
goes before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from lorafx.errors import CapacityError, ConfigError, LorafxError, nearest
from lorafx.serving.continuous.adapter_requests import Ticket, ticket_of
from lorafx.serving.continuous.pairs import drop
from lorafx.session.session import Session

_SUFFIX = ", adapters within slots"

#: Steps for which an adapter may be passed over in favour of those that have a slot.
PATIENCE = 8

#: What is in the step, whether the cache had no room for something, and three numbers.
_Scheduled: TypeAlias = tuple[list[FutureRequestState], bool, bool, int, int]


class SlotsPerStep:
    """Mixed into the class of a scheduler (`within_slots`).

    Attributes:
        session: of the model that is served.
        fail: ends a request that cannot be served, with the error that says why.
        gone: told of a request that was cancelled.
        stuck: the candidates of the step that is being made, where the cache had no room for any.
    """

    session: Session
    fail: Callable[[RequestState, LorafxError], None]
    gone: Callable[[RequestState], None]
    stuck: Sequence[RequestState] = ()

    def _process_candidates(
        self, candidates: list[RequestState], *args: Any, **kwargs: Any
    ) -> _Scheduled:
        ready = self._ready(self._servable(candidates))
        scheduler: Any = super()
        result: _Scheduled = scheduler._process_candidates(ready, *args, **kwargs)
        if not result[0] and result[1]:
            # What holds the cache may be requests that have to wait for a slot: those first.
            begun = [state for state in candidates if state.status != RequestStatus.PENDING]
            again = self._ready(begun) if len(ready) < len(candidates) else []
            if again:
                ready = again
                result = scheduler._process_candidates(ready, *args, **kwargs)
        self.stuck = ready if not result[0] and result[1] else ()
        return result

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Forget the requests that were cancelled, and return them."""
        scheduler: Any = super()
        cancelled: list[RequestState] = scheduler.clear_cancelled_requests()
        for state in cancelled:
            self.gone(state)
            drop(state)
        if cancelled:
            own: Any = self
            own.block_new_requests = False  # as where a request has finished
        return cancelled

    def _servable(self, candidates: Sequence[RequestState]) -> Sequence[RequestState]:
        """The candidates without those, which fail, that no slot is left for."""
        store = self.session.store
        pinned = store.pinned
        if not pinned:
            return candidates
        tickets = [ticket_of(state) for state in candidates]
        names = self._names(tickets)
        found = []
        for state, ticket in zip(candidates, tickets, strict=True):
            name = None if ticket is None else names.get(ticket)
            own = frozenset(() if name is None else (name,))
            # Without room for its own weights a request says so in its step.
            if name is None or own <= pinned or store.fits(own) or not store.fits(own, own=True):
                found.append(state)
            else:
                self.fail(state, all_pinned(name, len(pinned)))
        return found

    def _ready(self, candidates: Sequence[RequestState]) -> Sequence[RequestState]:
        tickets = [ticket_of(state) for state in candidates]
        names = self._names(tickets)
        if self.session.store.fits(frozenset(names.values())):
            for waiting in names:
                waiting.waited = 0
            return candidates
        wanted: dict[str, int] = {}
        for waiting, name in names.items():
            wanted[name] = max(wanted.get(name, 0), waiting.waited)
        chosen = self._chosen(wanted)
        ready = []
        for state, ticket in zip(candidates, tickets, strict=True):
            if ticket is None or ticket not in names:
                ready.append(state)
                continue
            has_slot = names[ticket] in chosen
            if has_slot:
                ready.append(state)
            ticket.waited = 0 if has_slot else ticket.waited + 1
            self.session.counts.waits += not has_slot
        return ready

    def _names(self, tickets: Iterable[Ticket | None]) -> dict[Ticket, str]:
        """The adapters of those tickets that have one, as the store knows them now."""
        holds = {t: t.hold for t in tickets if t is not None and t.hold is not None}
        return dict(zip(holds, self.session.store.held_names(holds.values()), strict=True))

    def _chosen(self, wanted: dict[str, int]) -> set[str]:
        """Of the adapters that are wanted, which do not find slots together, with the steps that
        each has waited, those that are served in this step."""
        store = self.session.store
        resident = store.resident

        def first(name: str) -> tuple[bool, int, bool]:
            urgent = wanted[name] >= PATIENCE
            return not urgent, -wanted[name] if urgent else 0, name not in resident

        chosen = frozenset[str]()
        for name in sorted(wanted, key=first):
            if len(chosen) == store.max_adapters:
                break
            # The first is let through where pinned ones leave no room for weights of its own: its
            # requests say so.
            lacking = not chosen and not store.fits(frozenset({name}), own=True)
            if lacking or store.fits(chosen | {name}):
                chosen |= {name}
        return set(chosen)


def all_pinned(name: str, pinned: int) -> CapacityError:
    """The slots that are pinned to other adapters leave none."""
    return CapacityError(
        f"no slot for {name!r} beside {pinned} adapters that are pinned; unpin_adapter() one, or "
        "compile with a larger LoraConfig(max_adapters=...)"
    )


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
