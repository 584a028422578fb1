"""What a forward needs to know about its batch: which slot each request uses.

    slots: (n,) int32 on the model's device, −1 for a base row
    gates: k slots and weights for each row, where tokens have several adapters

One Runtime serves all marks of one model. The host sets it before a forward; marks and graphs only
read it. The slots are written in place, at the beginning of a buffer.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lorafx.errors import BatchError

# The slots of every live Runtime. Dynamo makes the shapes of tensors that it reaches through a
# module or its hooks static, but not of those in a global. Keys are strings: never symbolic.
_SLOTS: dict[str, Tensor] = {}
# Keys of dead runtimes, removed when the next runtime is made: garbage may be collected while
# Dynamo iterates over `_SLOTS`, which must not change then.
_GONE: deque[str] = deque()
_KEYS = itertools.count()
_SMALLEST_BUFFER = 64


def holds_slots(value: object) -> bool:
    """Whether this is the dict that holds the slots of all live Runtimes."""
    return value is _SLOTS


class Gates(NamedTuple):
    """Several adapters for each of n tokens, or n requests.

    Attributes:
        slots: (k, n) int32, −1 for none.
        weights: (k, n) float32, 0 for none.
        routes: (n,) int32, the slot of what chooses among them; −1 where they have `weights`.
        top_k, temperatures: (n,) int32 and float32, how that chooses (`Arrow`).
    """

    slots: Tensor
    weights: Tensor
    routes: Tensor | None = None
    top_k: Tensor | None = None
    temperatures: Tensor | None = None


class RefusesAtRest(Protocol):
    def refuse(self, path: str, layer: str) -> None:
        """Raise MatchError if the default adapter changes the layer."""

    def refuse_slips(self) -> None:
        """Raise ConfigError if the model's own call has a keyword that was meant for lorafx."""

    def refuse_elsewhere(self) -> None:
        """Raise BatchError if another thread is in a call."""


class Runtime:
    """The batch that the next forward serves.

    Attributes:
        capacity: number of slots; requests use 0 to capacity − 1, or −1.
        rows: the slots as host ints.
        gates: what tokens have in place of one slot each, else None; `rows` are then the first.
        active: some request uses an adapter. False makes every mark a no-op, so that a graph
            captured then is the base model's. So does None, outside of calls while an adapter is
            the default or a block of `lorafx.adapters` is open; other libraries' traces of layers
            that the adapter changes are refused.
        uniform: all requests use the same slot, which every batch has to before the rows' owners
            are proved.
        graph_passes: graphs of this model go through lorafx's own passes. A mark that cannot add
            its delta in a trace then leaves the weight's use to the `match` pass; else it raises.
        session: the session that serves the model, or None; it is found through the marks.
        resting: refuses layers that run by themselves in eager mode; None without a session.
        deltas: adds the deltas of the eager forward that is running, whose batch may mix adapters;
            else None.

    Copies and pickles have no session. They keep the batch, but of a served model they have none.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self.graph_passes = True
        self.session: Any = None
        self.resting: RefusesAtRest | None = None
        self.deltas: Any = None
        self._graph_slots: Tensor | None = None
        self.rows: tuple[int, ...] = ()
        self.gates: Gates | None = None
        self.active: bool | None = False
        self._register()
        self.clear()

    @property
    def slots(self) -> Tensor:
        """(n,) int32, the slot of each request, −1 for the base."""
        return _SLOTS[self._key]

    @property
    def graph_slots(self) -> Tensor:
        """The slot of each row of the graph that is about to run."""
        return self.slots if self._graph_slots is None else self._graph_slots

    @contextmanager
    def rows_of(self, slots: Tensor | None) -> Iterator[None]:
        """Within the block, graphs serve rows with these slots; None for those of the batch."""
        before, self._graph_slots = self._graph_slots, slots
        try:
            yield
        finally:
            self._graph_slots = before

    def set_rows(self, slots: Sequence[int] | Tensor, gates: Gates | None = None) -> None:
        """Serve requests with these slots, in [−1, capacity), or with `gates`, of which they are
        the first, from the next forward on. Raises BatchError for no request, a slot out of range,
        or new slots during CUDA graph capture."""
        rows = tuple(slots.tolist() if isinstance(slots, Tensor) else slots)
        if not rows:
            raise BatchError("a batch needs at least one request, got an empty list of slots")
        low, high = min(rows), max(rows)
        if low < -1 or high >= self.capacity:
            wrong = low if low < -1 else high
            raise BatchError(
                f"request {rows.index(wrong)} asks for slot {wrong}; slots are 0 to "
                f"{self.capacity - 1}, and -1 is the base model"
            )
        self._graph_slots = None  # an interrupt may have left them
        if rows != self.rows:  # a decode step repeats the last one's
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise BatchError(
                    "the slots of other rows than the last call's would be written while a CUDA "
                    "graph is captured, and again by each replay, which would then serve no other "
                    "mix; make the same call right before the capture"
                )
            self.rows = ()  # so that an interrupted write does not count
            self._write(rows, slots if isinstance(slots, Tensor) else None)
            self.rows = rows
        self.active, self.uniform, self.gates = high >= 0, low == high, gates
        if gates is not None:
            self.active = int(gates.slots.max()) >= 0
            self.uniform = not self.active
            moved: list[Any] = [None if v is None else v.to(self.device) for v in gates]
            self.gates = Gates(*moved)

    def clear(self) -> None:
        self.set_rows([-1])

    def _register(self) -> None:
        while _GONE:
            _SLOTS.pop(_GONE.popleft(), None)
        self._key = f"runtime {next(_KEYS)}"
        self._buffer = torch.empty(0)
        _SLOTS[self._key] = torch.empty(0, dtype=torch.int32)
        weakref.finalize(self, _GONE.append, self._key)

    def _write(self, rows: Sequence[int], source: Tensor | None = None) -> None:
        n = len(rows)
        # Inference tensors may not be written outside inference mode, and Dynamo guards on the
        # difference: the buffer is made in the same way in every mode of the caller.
        with torch.inference_mode(False):
            if n > self._buffer.numel():
                size = max(_SMALLEST_BUFFER, 2 * n)
                self._buffer = torch.empty(size, dtype=torch.int32, device=self.device)
            slots = self.slots
            if slots.shape[0] != n or slots.data_ptr() != self._buffer.data_ptr():
                # Not a slice: Dynamo would also trace and guard the base of a view.
                slots = torch.empty(0, dtype=torch.int32, device=self.device).set_(
                    self._buffer.untyped_storage(), 0, (n,), (1,)
                )
            _copy(torch.tensor(rows, dtype=torch.int32) if source is None else source, slots)
            _SLOTS[self._key] = slots

    def __getstate__(self) -> dict[str, Any]:
        excluded = ("_key", "_buffer", "_graph_slots", "session", "resting", "deltas", "gates")
        state = {k: v for k, v in vars(self).items() if k not in excluded}
        return state if self.session is None else {**state, **_AT_REST}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.session = self.resting = self.deltas = self._graph_slots = self.gates = None
        self._register()
        self._write(self.rows)


#: The fields after `clear`.
_AT_REST = {"rows": (-1,), "active": False, "uniform": True}


def _copy(host: Tensor, slots: Tensor) -> None:
    if slots.device.type == "cuda":
        # The host would wait for unpinned memory. torch keeps pinned memory until it is copied.
        slots.copy_(host.pin_memory(), non_blocking=True)
    else:
        slots.copy_(host)
