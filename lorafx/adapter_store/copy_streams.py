"""Copies of adapters into slots, on a stream beside the running steps.

    a copy into slots    waits for earlier uses of these slots, and for earlier copies
    a use of slots       waits for the last copy into each of them

Only device streams wait, by events. Uses on several streams are ordered (`lorafx.runtime.running`),
so it suffices to wait for the last use of a slot. Once a call has been captured into a CUDA graph,
whose replays lorafx cannot see, copies are made on the current stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.interrupts import undisturbed

#: The end of a use of a slot: an event, or the present work of a stream.
_UseEnd: TypeAlias = "torch.cuda.Stream | torch.cuda.Event"


@dataclass(eq=False)
class _Copy:
    """A copy of the adapter `name`, with its `sources` until `done`; `awaited` by some call."""

    name: str
    event: torch.cuda.Event
    sources: Sequence[object]
    done: bool = False
    awaited: bool = False


class _Lane:
    """The copy stream of a device, with the last use and the last copy of each slot."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # Banks were made on the current stream, just before.
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self.copies: dict[int, _Copy] = {}
        self.last_uses: dict[int, _UseEnd] = {}
        self._using: dict[int, torch.cuda.Stream] = {}  # streams of uses in progress
        self._in_flight: deque[_Copy] = deque()  # in the order in which they end

    def keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device == self.device:
                tensor.record_stream(self.stream)

    def use(self, slots: Collection[int]) -> None:
        self._release_done()
        stream = torch.cuda.current_stream(self.device)
        for copy in self.pending(slots):
            stream.wait_event(copy.event)
            copy.awaited = True
        uses = dict.fromkeys(slots, stream)
        self.last_uses.update(uses)
        self._using.update(uses)

    def end_uses(self) -> None:
        events = {stream: stream.record_event() for stream in set(self._using.values())}
        self.last_uses.update({slot: events[stream] for slot, stream in self._using.items()})
        self._using.clear()

    def wait(self, slots: Iterable[int]) -> None:
        for end in dict.fromkeys(self.last_uses[slot] for slot in slots if slot in self.last_uses):
            if isinstance(end, torch.cuda.Stream):
                self.stream.wait_stream(end)
            else:
                self.stream.wait_event(end)

    def record_copy(self, name: str, slots: Iterable[int], sources: Sequence[object]) -> None:
        self._release_done()
        copy = _Copy(name, self.stream.record_event(), sources)
        self.copies.update(dict.fromkeys(slots, copy))
        self._in_flight.append(copy)

    def pending(self, slots: Iterable[int]) -> list[_Copy]:
        copies = dict.fromkeys(self.copies[slot] for slot in slots if slot in self.copies)
        return [copy for copy in copies if not copy.done]

    def _release_done(self) -> None:
        while self._in_flight and self._in_flight[0].event.query():
            copy = self._in_flight.popleft()
            copy.done, copy.sources = True, ()


class CopyStreams:
    """The copy streams of all CUDA devices. Safe to use from several threads."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._lanes = [_Lane(device) for device in devices if device.type == "cuda"]
        for lane in self._lanes:
            lane.keep(tensors)
        self._lock = threading.RLock()
        self.captured = False

    def refuse_captured(self, names: Sequence[str]) -> None:
        """Raise BatchError if adapters would be written into slots during a CUDA graph capture."""
        if names and self._capturing():
            raise BatchError(
                f"{', '.join(map(repr, names))} would be written into the banks while a CUDA graph "
                "is captured, and again by each replay; call the model with the same adapters once "
                "before the capture"
            )

    def use(self, slots: Collection[int]) -> None:
        """Make later launches wait for the last copies into these slots, and later copies for these
        launches. Raises BatchError during a capture if no call has waited for such a copy yet."""
        if not self._lanes:
            return
        if self._capturing():
            copies = [copy for lane in self._lanes for copy in lane.pending(slots)]
            names = dict.fromkeys(repr(copy.name) for copy in copies if not copy.awaited)
            if names:
                raise BatchError(
                    f"{', '.join(names)} may still be on the way into slots, for which a CUDA "
                    "graph that is being captured cannot wait; call the model with these adapters "
                    "once before the capture"
                )
            return
        with self._lock:
            for lane in self._lanes:
                lane.use(slots)

    def end_uses(self) -> None:
        """The uses that have begun end with the work that has been launched so far."""
        if self._lanes and not self._capturing():
            with self._lock:
                for lane in self._lanes:
                    lane.end_uses()

    def copy(
        self,
        name: str,
        slots: Collection[int],
        write: Callable[[], Sequence[object]],
        touched: Collection[int],
    ) -> None:
        """Call `write`, which launches copies into `slots` and returns their sources. They wait for
        earlier uses of the slots `touched`. Raises as `refuse_captured`."""
        self.refuse_captured([name])
        if not self._lanes or self.captured:
            self.use(touched)
            write()
            return

        def copy() -> None:
            sources: Sequence[object] = ()
            with self._lock, ExitStack() as streams:
                for lane in self._lanes:
                    lane.wait(touched)
                    streams.enter_context(torch.cuda.stream(lane.stream))
                try:
                    sources = write()
                finally:  # a failed write may have launched copies
                    for lane in self._lanes:
                        lane.record_copy(name, slots, sources)

        # An interrupt in between would leave the caller on the copy stream.
        undisturbed(copy)

    def _capturing(self) -> bool:
        capturing = bool(self._lanes) and torch.cuda.is_current_stream_capturing()
        self.captured |= capturing
        return capturing
