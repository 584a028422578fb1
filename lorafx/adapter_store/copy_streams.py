"""Copies of adapters into slots, on a stream beside the running steps.

    a copy into slots    waits for earlier uses of these slots, and for earlier copies
    a use of slots       waits for the last copy into each of them

Only device streams wait, by events. Uses on several streams are ordered (`lorafx.runtime.running`),
so the last use of a slot stands for the earlier ones. Once a call has been captured into a CUDA
graph, whose replays are invisible to lorafx, copies are made on the current stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.interrupts import undisturbed

#: A slot is free again after this work of a stream, or this event.
_Mark: TypeAlias = "torch.cuda.Stream | torch.cuda.Event"


@dataclass(eq=False)
class _Copy:
    """A copy of `name`, with its source `host` until `done`; `awaited` by a stream of calls."""

    name: str
    event: torch.cuda.Event
    host: Sequence[object]
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
        self.users: dict[int, _Mark] = {}
        self._using: dict[int, torch.cuda.Stream] = {}  # streams of uses in progress
        self._flying: deque[_Copy] = deque()  # in the order in which they end

    def keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device == self.device:
                tensor.record_stream(self.stream)

    def use(self, slots: Collection[int]) -> None:
        self._land()
        stream = torch.cuda.current_stream(self.device)
        for copy in self.pending(slots):
            stream.wait_event(copy.event)
            copy.awaited = True
        began = dict.fromkeys(slots, stream)
        self.users.update(began)
        self._using.update(began)

    def used(self) -> None:
        events = {stream: stream.record_event() for stream in set(self._using.values())}
        self.users.update({slot: events[stream] for slot, stream in self._using.items()})
        self._using.clear()

    def wait(self, slots: Iterable[int]) -> None:
        for user in dict.fromkeys(self.users[slot] for slot in slots if slot in self.users):
            if isinstance(user, torch.cuda.Stream):
                self.stream.wait_stream(user)
            else:
                self.stream.wait_event(user)

    def copied(self, name: str, slots: Iterable[int], host: Sequence[object]) -> None:
        self._land()
        copy = _Copy(name, self.stream.record_event(), host)
        self.copies.update(dict.fromkeys(slots, copy))
        self._flying.append(copy)

    def pending(self, slots: Iterable[int]) -> list[_Copy]:
        found = dict.fromkeys(self.copies[slot] for slot in slots if slot in self.copies)
        return [copy for copy in found if not copy.done]

    def _land(self) -> None:
        while self._flying and self._flying[0].event.query():
            copy = self._flying.popleft()
            copy.done, copy.host = True, ()


class CopyStreams:
    """The copy streams of all CUDA devices. Safe to use from several threads."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._lanes = [_Lane(device) for device in devices if device.type == "cuda"]
        for lane in self._lanes:
            lane.keep(tensors)
        self._lock = threading.RLock()
        self.captured = False

    @property
    def beside(self) -> bool:
        return bool(self._lanes) and not self.captured

    def refuse_captured(self, names: Sequence[str]) -> None:
        """Raise BatchError where adapters would be written into slots during CUDA graph capture."""
        if names and self._capturing():
            raise BatchError(
                f"{', '.join(map(repr, names))} would be written into the banks while a CUDA graph "
                "is captured, and again by each replay; call the model with the same adapters once "
                "before the capture"
            )

    def use(self, slots: Collection[int]) -> None:
        """Later launches wait for the last copies into these slots, and later copies for the
        launches. Raises BatchError during a capture if no call has waited for a copy yet."""
        if not self._lanes:
            return
        if self._capturing():
            copies = [copy for lane in self._lanes for copy in lane.pending(slots)]
            flying = dict.fromkeys(repr(copy.name) for copy in copies if not copy.awaited)
            if flying:
                raise BatchError(
                    f"{', '.join(flying)} may still be on the way into slots, for which a CUDA "
                    "graph that is being captured cannot wait; call the model with these adapters "
                    "once before the capture"
                )
            return
        with self._lock:
            for lane in self._lanes:
                lane.use(slots)

    def used(self) -> None:
        """Ends the begun uses at what has been launched so far."""
        if self._lanes and not self._capturing():
            with self._lock:
                for lane in self._lanes:
                    lane.used()

    def copy(
        self,
        name: str,
        slots: Collection[int],
        write: Callable[[], Sequence[object]],
        behind: Collection[int],
    ) -> None:
        """`write` launches copies into `slots`, after earlier uses of the slots `behind`, and
        returns their sources. Raises as `refuse_captured`."""
        self.refuse_captured([name])
        if self.beside:
            # An interrupt would leave the caller on the copy stream.
            undisturbed(partial(self._copy, name, slots, write, behind))
        else:
            self.use(behind)
            write()

    def _copy(
        self,
        name: str,
        slots: Collection[int],
        write: Callable[[], Sequence[object]],
        behind: Collection[int],
    ) -> None:
        host: Sequence[object] = ()
        with self._lock, ExitStack() as streams:
            for lane in self._lanes:
                lane.wait(behind)
                streams.enter_context(torch.cuda.stream(lane.stream))
            try:
                host = write()
            finally:  # a failed write may have launched copies
                for lane in self._lanes:
                    lane.copied(name, slots, host)

    def _capturing(self) -> bool:
        capturing = bool(self._lanes) and torch.cuda.is_current_stream_capturing()
        self.captured |= capturing
        return capturing
