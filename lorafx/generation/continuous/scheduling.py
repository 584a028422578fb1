"""Which requests may be in the next step: those whose adapters fit into the slots together. And
which one fails where the cache is full.

transformers' schedulers decide the order, and how many tokens there is room for. Adapters that are
in a slot go first, since a change of slots costs a copy; one that was passed over for `PATIENCE`
steps goes before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from lorafx.errors import CapacityError, ConfigError, LorafxError, nearest
from lorafx.generation.continuous.adapter_requests import hold_of
from lorafx.runtime.session import Session

_SUFFIX = ", adapters within slots"

#: Steps for which an adapter may be passed over in favour of those that have a slot.
PATIENCE = 8

#: What is in the step, whether the cache had no room for something, and three numbers.
_Scheduled: TypeAlias = tuple[list[FutureRequestState], bool, bool, int, int]


class SlotsPerStep:
    """Mixed into the class of a scheduler (`within_slots`). `stuck` are the candidates of the step
    that is being made, where the cache had no room for any."""

    stuck: Sequence[RequestState] = ()

    def begin(
        self,
        session: Session,
        fail: Callable[[RequestState, LorafxError], None],
        gone: Callable[[RequestState], None],
    ) -> None:
        """Keep to the slots of `session`. `fail` ends a request that cannot be served, `gone` is
        called with one that was cancelled."""
        self._session, self._fail, self._gone = session, fail, gone
        #: By version of an adapter, the steps for which it was ready and had no slot.
        self._waited: Counter[int] = Counter()

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
            self._gone(state)
        if cancelled:
            this: Any = self
            this.block_new_requests = False  # as where a request has finished
        return cancelled

    def _servable(self, candidates: Sequence[RequestState]) -> Sequence[RequestState]:
        """The candidates without those that pinned adapters leave no slot for, which fail."""
        store = self._session.store
        pinned = store.pinned
        if not pinned:
            return candidates
        names, found = self._names(candidates), []
        for state in candidates:
            hold = hold_of(state)
            name = None if hold is None else names[hold.stored.version]
            wanted = frozenset[str]() if name is None else frozenset({name})
            if wanted <= pinned or store.fits(wanted):
                found.append(state)
            else:
                self._fail(state, all_pinned(str(name), len(pinned)))
        return found

    def _ready(self, candidates: Sequence[RequestState]) -> Sequence[RequestState]:
        """The candidates whose adapters have a slot in this step; notes which wait."""
        names = self._names(candidates)
        if self._session.store.fits(frozenset(names.values())):
            self._waited.clear()
            return candidates
        chosen = self._chosen({name: self._waited[version] for version, name in names.items()})
        passed_over = {version for version, name in names.items() if name not in chosen}
        for version in names:
            self._waited[version] = self._waited[version] + 1 if version in passed_over else 0
        ready = []
        for state in candidates:
            hold = hold_of(state)
            if hold is None or hold.stored.version not in passed_over:
                ready.append(state)
        self._session.counts.waits += len(candidates) - len(ready)
        return ready

    def _names(self, candidates: Iterable[RequestState]) -> dict[int, str]:
        """The adapters of these requests by their versions, as the store knows them now."""
        holds = [hold for state in candidates if (hold := hold_of(state)) is not None]
        return {hold.stored.version: hold.name for hold in holds}

    def _chosen(self, waited: dict[str, int]) -> frozenset[str]:
        """Those that are served in this step of adapters that do not find slots together, by the
        steps that each has waited."""
        store = self._session.store
        resident = store.resident

        def order(name: str) -> tuple[bool, int, bool]:
            urgent = waited[name] >= PATIENCE
            return not urgent, -waited[name] if urgent else 0, name not in resident

        chosen = frozenset[str]()
        for name in sorted(waited, key=order):
            if len(chosen) == store.max_adapters:
                break
            if store.fits(chosen | {name}):
                chosen |= {name}
        return chosen


def all_pinned(name: str, pinned: int) -> CapacityError:
    """The adapters that are pinned leave no room."""
    return CapacityError(
        f"no slot for {name!r}, or no room for its own weights, beside {pinned} adapters that are "
        "pinned; unpin_adapter() one, or compile with a larger LoraConfig(max_adapters=...) or "
        "LoraConfig(max_own_weights=...)"
    )


def within_slots(scheduler_type: str) -> str:
    """The name of a scheduler in transformers' registry that keeps to the slots, and otherwise does
    what the one that is called `scheduler_type` does; ConfigError where there is none."""
    cls = SCHEDULER_MAPPING.get(scheduler_type)
    if cls is None:
        known = [name for name in SCHEDULER_MAPPING if not name.endswith(_SUFFIX)]
        raise ConfigError(
            f"transformers has no scheduler {scheduler_type!r}{nearest(scheduler_type, known)}; "
            f"there are {', '.join(known)}"
        )
    name = f"{scheduler_type}{_SUFFIX}"
    within: Any = type(cls.__name__, (SlotsPerStep, cls), {})
    SCHEDULER_MAPPING.setdefault(name, within)
    return name


class FullCache(OffloadingManager):
    """transformers' manager takes cached blocks and other requests out of the cache, which begin
    again later, and ends where nothing is left to take out. Here the one request fails that the
    cache cannot hold."""

    fail: Callable[[RequestState, CapacityError], None]

    def offload_requests(self) -> bool:
        """Make room for the next step; whether there is a reason to try again."""
        if super().offload_requests():
            return True
        scheduler: Any = self.scheduler
        if not scheduler.stuck:
            return False
        waiting = [s for s in scheduler.stuck if s.status == RequestStatus.PENDING]
        starved = [state for state, _ in scheduler.starved_requests]
        state = [*starved[-1:], *waiting, *scheduler.stuck][0]
        tokens = len(state.initial_tokens) + len(state.generated_tokens)
        self.fail(
            state,
            CapacityError(
                f"request {state.request_id!r}, at {tokens} tokens, does not fit into the cache; "
                "give a larger ContinuousBatchingConfig(num_blocks=...), or ask for fewer tokens"
            ),
        )
        return True
