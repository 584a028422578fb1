"""What happens where the cache has no room for any request of a step.

transformers takes cached blocks and other requests out of the cache, which begin again later. Where
nothing is left to take out, its engine ends. Here the one request fails that the cache cannot hold.
"""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestStatus

from lorafx.errors import CapacityError


class Room(OffloadingManager):
    """transformers' manager, over a scheduler of lorafx.serving.continuous.scheduling."""

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
        scheduler.fail(
            state,
            CapacityError(
                f"request {state.request_id!r}, at {tokens} tokens, does not fit into the cache; "
                "give a larger ContinuousBatchingConfig(num_blocks=...), or ask for fewer tokens"
            ),
        )
        return True
