"""Asynchronous batching: transformers launches a step before it knows what came of the one before.

    host   prepare 0, launch 0 | prepare 1, launch 1, update 0 | prepare 2, launch 2, update 1
    device                       step 0                          step 1

Steps have two pairs of buffers in turn. The slots of a step need none: they are written, in place,
on the stream on which the steps run, so a step has read them before the next one's are written.
Tokens that are not known yet are carried over on the device from the step before. Requests that
have failed or gone meanwhile are marked as finished, which has their part of a step under way
dropped. A step that fails as a whole leaves its pair to the next one; what came of the one before
it is then known one step later.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.input_outputs import (
    ContinuousBatchingAsyncIOs,
    ContinuousBatchingIOs,
)
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus


class Pairs(ContinuousBatchingAsyncIOs):
    """transformers' pairs, which carry a token over to the request that it is of. transformers goes
    by the name, which another request may have by then."""

    def infer_carry_over_ids(self) -> Tensor:
        """The token of the step before that each token of this one is, or -1."""
        step, before = (
            self.io_pairs[pair].host_io for pair in (self.current_pair, 1 - self.current_pair)
        )
        known = {id(future.state) for future in before.requests_in_batch}
        states = [future.state for future in step.requests_in_batch]
        same = {state.request_id for state in states if id(state) in known}
        positions = step.req_id_to_new_token_position
        step.req_id_to_new_token_position = {n: p for n, p in positions.items() if n in same}
        try:
            return super().infer_carry_over_ids()
        finally:
            step.req_id_to_new_token_position = positions


def paired(ios: Any) -> bool:
    """Whether steps are asynchronous; their pairs are those above then. The engine makes them."""
    if not isinstance(ios, ContinuousBatchingAsyncIOs):
        return False
    found: Any = ios
    found.__class__ = Pairs
    return True


def step_of(ios: ContinuousBatchingIOs | ContinuousBatchingAsyncIOs) -> ContinuousBatchingIOs:
    """What the host has of the step that is being prepared or launched."""
    if isinstance(ios, ContinuousBatchingAsyncIOs):
        return ios.io_pairs[ios.current_pair].host_io
    return ios


def drop(state: RequestState) -> None:
    """Have what comes of a request that has ended, in a step under way, go nowhere."""
    state._status = RequestStatus.FINISHED
