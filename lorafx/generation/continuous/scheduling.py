"""Selects the requests that may be in the next step: those whose adapters have slots together; and
the request that fails when the cache is full.

transformers' schedulers decide the order and the number of tokens, `turns` which adapters may be in
the step, `shares`, if there are any, which waiting requests may begin and in which order.
"""

from __future__ import annotations

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
from lorafx.generation.continuous.adapter_requests import AdapterRequest, account_of, hold_of
from lorafx.generation.continuous.drafts import Drafts
from lorafx.generation.continuous.shares import Asking, Shares
from lorafx.generation.continuous.turns import Asked, Turns
from lorafx.runtime.session import Session

_SUFFIX = ", adapters within slots"

#: The requests of the step, whether the cache lacked room for one, and results not used here.
_Scheduled: TypeAlias = tuple[list[FutureRequestState], bool, bool, int, int]


class SlotsPerStep:
    """A mixin for a class of schedulers (`within_slots`). `stuck` has the candidates of a step if
    the cache had no room for any of them; otherwise it is empty."""

    stuck: Sequence[RequestState] = ()

    def begin(
        self,
        session: Session,
        fail: Callable[[RequestState, LorafxError], None],
        cancelled: Callable[[RequestState], None],
        shares: Shares,
        drafts: Drafts | None,
    ) -> None:
        """Respect the slots of `session` and the shares of adapters, and run `drafts`. `fail` is
        called with a request that cannot be served and its error, `cancelled` with a request that
        was cancelled."""
        self._session, self._fail, self._cancelled = session, fail, cancelled
        self._turns, self._shares, self._drafts = Turns(), shares, drafts

    def _get_waiting_candidates(self) -> list[RequestState]:
        scheduler: Any = super()
        waiting: list[RequestState] = scheduler._get_waiting_candidates()
        if not self._shares.given:
            return waiting
        this: Any = self
        running = map(_asking, this.active_requests.values())
        return [waiting[index] for index in self._shares.order(map(_asking, waiting), running)]

    def _process_candidates(
        self, candidates: list[RequestState], token_budget: int, *args: Any
    ) -> _Scheduled:
        ready = self._ready(self._servable(candidates))
        scheduler: Any = super()
        this: Any = self
        if self._drafts is not None:
            self._drafts.propose(ready, token_budget, this.active_requests)
        result: _Scheduled = scheduler._process_candidates(ready, token_budget, *args)
        if not result[0] and result[1]:
            # Requests that wait for a slot may occupy the cache, so running ones are tried first.
            begun = [state for state in candidates if state.status != RequestStatus.PENDING]
            running = self._ready(begun) if len(ready) < len(candidates) else []
            if running:
                ready = running
                result = scheduler._process_candidates(ready, token_budget, *args)
        self.stuck = ready if not result[0] and result[1] else ()
        if self._drafts is not None:
            self._drafts.scheduled(result[0])
        if self._shares.given:
            contended = any(state.status == RequestStatus.PENDING for state in candidates)
            contended |= this.block_new_requests and bool(this.waiting_requests)
            tokens = ((account_of(future.state), future.query_length) for future in result[0])
            self._shares.advance(tokens, contended)
        return result

    def _schedule_request(
        self, state: RequestState, request_tokens: list[int], token_budget: int, *args: Any
    ) -> None:
        if state.status == RequestStatus.DECODING:  # what does not fit is of its draft
            del request_tokens[token_budget:]
        scheduler: Any = super()
        scheduler._schedule_request(state, request_tokens, token_budget, *args)

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Forget the requests that were cancelled, and return them."""
        scheduler: Any = super()
        cancelled: list[RequestState] = scheduler.clear_cancelled_requests()
        for state in cancelled:
            self._cancelled(state)
        if cancelled:
            this: Any = self
            this.block_new_requests = False  # as after a request has finished
        return cancelled

    def _servable(self, candidates: Sequence[RequestState]) -> Sequence[RequestState]:
        """The candidates except those for which pinned adapters leave no slot: these fail."""
        store = self._session.store
        pinned = store.pinned
        if not pinned:
            return candidates
        names, servable = self._names(candidates), []
        for state in candidates:
            hold = hold_of(state)
            name = None if hold is None else names[hold.stored.version]
            adapters = frozenset[str]() if name is None else frozenset({name})
            if adapters <= pinned or store.fits(adapters):
                servable.append(state)
            else:
                self._fail(state, all_pinned(str(name), len(pinned)))
        return servable

    def _ready(self, candidates: Sequence[RequestState]) -> Sequence[RequestState]:
        """The candidates that may be in this step; the others wait for a slot."""
        asked = [_asked(state) for state in candidates]
        turn = self._turns.next(filter(None, asked), self._session.store)
        ready = [
            state
            for state, request in zip(candidates, asked, strict=True)
            if request is None or turn.admits(request)
        ]
        self._session.counts.waits += len(candidates) - len(ready)
        return ready

    def _names(self, candidates: Iterable[RequestState]) -> dict[int, str]:
        """The adapters of these requests: version -> its current name in the store."""
        holds = [hold for state in candidates if (hold := hold_of(state)) is not None]
        return {hold.stored.version: hold.name for hold in holds}


def _asking(state: RequestState) -> Asking:
    """A sequence as shares count it: those of one request are one."""
    family = state.family if isinstance(state, AdapterRequest) else ()
    name = family[0] if family else state.request_id
    return Asking(account_of(state), name, len(state.remaining_prefill_tokens))


def _asked(state: RequestState) -> Asked | None:
    """What a request asks of the slots; None for the base model."""
    hold = hold_of(state)
    if hold is None:
        return None
    return Asked(hold.stored.version, hold.name, state.status != RequestStatus.PENDING)


def all_pinned(name: str, pinned: int) -> CapacityError:
    """The error for an adapter for which pinned ones leave no room."""
    return CapacityError(
        f"no slot for {name!r}, or no room for its own weights, beside {pinned} adapters that are "
        "pinned; unpin_adapter() one, or compile with a larger LoraConfig(max_adapters=...) or "
        "LoraConfig(max_own_weights=...)"
    )


def within_slots(scheduler_type: str) -> str:
    """The name in transformers' registry of a scheduler that respects the slots, derived from the
    scheduler `scheduler_type`. Raises ConfigError if there is no such scheduler."""
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
    """A manager that fails a request for which the cache is too small. transformers' manager makes
    room by removing cached blocks and other requests, which are restarted later, and ends the
    engine when nothing is left to remove. `fail` ends a request with an error."""

    fail: Callable[[RequestState, CapacityError], None]

    def offload_requests(self) -> bool:
        """Make room for the next step. Returns whether it should be tried again."""
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
