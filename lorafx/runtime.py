"""What a forward needs to know about its batch: which slot each request uses.

    slots: (n,) int32 on the model's device, −1 for a base row

One Runtime serves all marks of one model. It is set on the host before the forward; marks and
graphs only read it. `slots` is always a view from the start of one buffer that is written in
place, so that its address stays while the batch stays within the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafx.errors import BatchError


class Runtime:
    """The batch that the next forward serves.

    Attributes:
        slots: (n,) int32, the slot of each request, −1 for the base.
        active: some request uses an adapter. False makes every mark a no-op, so that a graph
            captured then is the base model's own.
        uniform: all requests use the same slot, the only kind of batch that is right before the
            rows' owners are proved.
        graph_passes: graphs of this model go through lorafx's own passes. A mark that cannot add
            its delta in a trace then leaves the weight's use to the `match` pass; where a foreign
            backend compiles the model nobody would, and the mark raises instead.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self.active = False
        self.uniform = True
        self.graph_passes = True
        self._grow(16)

    def set_rows(self, slots: Sequence[int]) -> None:
        """Serve requests with these slots from the next forward on.

        Args:
            slots: one int a request, in [−1, capacity).

        Raises:
            BatchError: no request, or a slot out of range; nothing has changed then.
        """
        rows = [int(slot) for slot in slots]
        if not rows:
            raise BatchError("a batch needs at least one request, got an empty list of slots")
        for index, slot in enumerate(rows):
            if not -1 <= slot < self.capacity:
                raise BatchError(
                    f"request {index} asks for slot {slot}; slots are 0 to {self.capacity - 1}, "
                    "-1 for the base model"
                )
        # Inference tensors may not be written outside inference mode, and Dynamo tells them
        # apart: the buffer and its views are made the same way whatever mode the caller is in.
        with torch.inference_mode(False):
            if len(rows) > self._buffer.numel():
                self._grow(2 * len(rows))
            self.slots = self._buffer[: len(rows)]
            self.slots.copy_(torch.tensor(rows, dtype=torch.int32))
        self.active = any(slot >= 0 for slot in rows)
        self.uniform = len(set(rows)) == 1

    def clear(self) -> None:
        """Serve the base model alone."""
        self.set_rows([-1])

    def _grow(self, rows: int) -> None:
        with torch.inference_mode(False):
            self._buffer: Tensor = torch.full((rows,), -1, dtype=torch.int32, device=self.device)
            self.slots: Tensor = self._buffer[:1]
