"""A request of the engine with its adapter, which stays with it until it is finished.

The engine copies requests (forks for returned sequences) and makes new ones of those that it had to
put off. Both keep the adapter, in the version that it had when the request was added.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState

from lorafx.adapter_store.stored import Hold


class Ticket:
    """What a request is served with. Copies of a request share it.

    Attributes:
        hold: the adapter in its version; None is the base model.
        waited: steps for which requests with this ticket were ready and had no slot.
    """

    def __init__(self, hold: Hold | None = None) -> None:
        self.hold = hold
        self.waited = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ticket:
        return self


@dataclass
class AdapterRequest(RequestState):
    """A request of the engine and its ticket.

    Attributes:
        weights: the base weights that it began with, as a number.
        begins: the token of the sequence from which on its adapter is active (aLoRA).
    """

    ticket: Ticket | None = None
    weights: int = 0
    begins: int = 0

    @property
    def salt(self) -> int:
        """What the keys and values of the request depend on besides its tokens, from the token
        `begins` on, in 128 bits; 0 is the base, as it was first."""
        hold = None if self.ticket is None else self.ticket.hold
        return (0 if hold is None else hold.stored.version) << 64 | self.weights

    def inactive(self, count: int) -> int:
        """How many of the last `count` tokens its adapter leaves to the base."""
        return min(max(self.begins - (self.position_offset - count), 0), count)

    def create_equivalent_initial_request(self) -> RequestState:
        """The request from its start, with the tokens that it has generated as part of the
        prompt."""
        again = super().create_equivalent_initial_request()
        given = {f.name: getattr(again, f.name) for f in fields(RequestState) if f.init}
        return AdapterRequest(**given, ticket=self.ticket, begins=self.begins)


def ticket_of(state: RequestState) -> Ticket | None:
    """The ticket of a request; None for those that the engine makes for itself to warm up."""
    return state.ticket if isinstance(state, AdapterRequest) else None
