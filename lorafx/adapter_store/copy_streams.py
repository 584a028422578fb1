"""Copies of adapters into slots, on a stream of their own beside the steps that are running.

    a copy into slots    waits for what has used these slots, and for the copies before it
    a use of slots       waits for the last copy into each of them

A use is whatever the current stream does with a slot: a step that reads it, or a write that is not
a copy. What waits is the stream of the device, by events; the host goes on. Uses on several streams
follow one another (`lorafx.session.running`), so the last use of a slot stands for those before it.

A CUDA graph that was captured around a call runs when its owner says, which nobody tells lorafx. So
once a call has been captured, copies are made on the current stream, as on devices without streams.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.interrupts import undisturbed

#: After which a slot is free again: what was launched on a stream so far, or until an event.
_Mark: TypeAlias = "torch.cuda.Stream | torch.cuda.Event"


@dataclass(eq=False)
class _Copy:
    """A copy of `name`. `host` is what it is made from, which lives until it is `done`. `awaited`:
    a stream of calls waits for it."""

    name: str
    event: torch.cuda.Event
    host: Sequence[object]
    done: bool = False
    awaited: bool = False


class _Lane:
    """One device: its stream of copies, and who has used and filled each slot there last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # Banks were made on the current stream, just before.
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self.copies: dict[int, _Copy] = {}
        self.users: dict[int, _Mark] = {}
        self._using: dict[int, torch.cuda.Stream] = {}  # those of the users that go on
        self._flying: deque[_Copy] = deque()  # in the order in which they end

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Have nobody else get the memory of these while a copy is on its way there."""
        for tensor in tensors:
            if tensor.device == self.device:
                tensor.record_stream(self.stream)

    def use(self, slots: Iterable[int]) -> None:
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
        """Have the stream of copies wait for what has used these slots."""
        for mark in dict.fromkeys(self.users[slot] for slot in slots if slot in self.users):
            if isinstance(mark, torch.cuda.Stream):
                self.stream.wait_stream(mark)
            else:
                self.stream.wait_event(mark)

    def copied(self, name: str, slots: Iterable[int], host: Sequence[object]) -> None:
        self._land()
        copy = _Copy(name, self.stream.record_event(), host)
        self.copies.update(dict.fromkeys(slots, copy))
        self._flying.append(copy)

    def pending(self, slots: Iterable[int]) -> list[_Copy]:
        """The last copies into these slots that are not known to be done."""
        found = dict.fromkeys(self.copies[slot] for slot in slots if slot in self.copies)
        return [copy for copy in found if not copy.done]

    def _land(self) -> None:
        while self._flying and self._flying[0].event.query():
            copy = self._flying.popleft()
            copy.done, copy.host = True, ()


class CopyStreams:
    """The streams of copies into the tensors of banks, one for each CUDA device; nothing on others.
    Safe to use from several threads."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._lanes = [_Lane(device) for device in devices if device.type == "cuda"]
        for lane in self._lanes:
            lane.keep(tensors)
        self._lock = threading.RLock()
        #: Whether a call was captured into a CUDA graph.
        self.captured = False

    @property
    def beside(self) -> bool:
        """Whether copies run beside what the current stream does."""
        return bool(self._lanes) and not self.captured

    def refuse_captured(self, names: Sequence[str]) -> None:
        """Refuse to write these adapters into slots while a call is captured into a CUDA graph.

        Raises:
            BatchError: there are some, and one is.
        """
        if names and self._capturing():
            raise BatchError(
                f"{', '.join(map(repr, names))} would be written into the banks while a CUDA graph "
                "is captured, and again by each replay; call the model with the same adapters once "
                "before the capture"
            )

    def use(self, slots: Iterable[int]) -> None:
        """Have what is launched on current streams from now on begin when these slots hold what was
        copied into them last; copies into them wait for it.

        Raises:
            BatchError: the stream is being captured into a CUDA graph, which cannot wait for what
                runs today, and no call has waited for the copy yet.
        """
        if not self._lanes:
            return
        slots = tuple(slots)
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
        """The uses that have begun end with what has been launched so far."""
        if self._lanes and not self._capturing():
            with self._lock:
                for lane in self._lanes:
                    lane.used()

    def write(self, name: str, slots: Iterable[int], write: Callable[[], object]) -> None:
        """Have `write` fill slots with `name` in the turn of the current stream, behind what has
        used these.

        Raises:
            BatchError: as `refuse_captured`.
        """
        self.refuse_captured([name])
        self.use(slots)
        write()

    def copy(
        self,
        name: str,
        slots: Sequence[int],
        write: Callable[[], Sequence[object]],
        behind: Sequence[int] | None = None,
    ) -> None:
        """Have `write` fill these slots with `name`, beside what has not used them.

        Args:
            write: launches copies on current streams, and returns what they are made from.
            behind: the slots whose uses it has to wait for; None for `slots`.

        Raises:
            BatchError: as `refuse_captured`.
        """
        behind = slots if behind is None else behind
        if not self.beside:
            self.write(name, behind, write)
            return
        self.refuse_captured([name])
        # Whole: an interrupt would leave the caller on the stream of copies.
        undisturbed(partial(self._copy, name, slots, write, behind))

    def _copy(
        self,
        name: str,
        slots: Sequence[int],
        write: Callable[[], Sequence[object]],
        behind: Sequence[int],
    ) -> None:
        host: Sequence[object] = ()
        with self._lock, ExitStack() as streams:
            for lane in self._lanes:
                lane.wait(behind)
                streams.enter_context(torch.cuda.stream(lane.stream))
            try:
                host = write()
            finally:  # what it has launched before it failed is waited for too
                for lane in self._lanes:
                    lane.copied(name, slots, host)

    def _capturing(self) -> bool:
        capturing = bool(self._lanes) and torch.cuda.is_current_stream_capturing()
        self.captured |= capturing
        return capturing
