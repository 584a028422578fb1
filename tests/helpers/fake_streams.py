"""CUDA as far as streams go: what is launched is noted, with all that it has to come after.

A launch is a number, what comes before it a set of numbers. Nothing runs, so `clashes` can say for
every order that a device may choose whether two launches that touch the same slot can meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lorafx.adapter_store.copy_streams import CopyStreams
from lorafx.model.bank import Bank
from lorafx.runtime.entry import Entry
from lorafx.runtime.running import Streams


@dataclass
class Launch:
    """What runs on `device`; `after` are the launches that it waits for."""

    number: int
    device: torch.device
    stream: Stream
    writes: bool
    slots: frozenset[Any]
    after: frozenset[int]


class Event:
    def __init__(self, cuda: Cuda, after: frozenset[int]) -> None:
        self.cuda, self.after = cuda, after

    def query(self) -> bool:
        """What the host has seen to be done comes before all that it launches later."""
        if not self.after <= self.cuda.done and self.cuda.finished():
            self.cuda.done |= self.after
        return self.after <= self.cuda.done


class Stream:
    made: Cuda

    def __init__(self, device: torch.device) -> None:
        self.device, self.after = device, frozenset[int]()

    def record_event(self) -> Event:
        return Event(self.made, self.after)

    def wait_event(self, event: Event) -> None:
        self.after |= event.after

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after


@dataclass
class Memory:
    """A tensor of a bank, as far as its memory goes."""

    device: torch.device

    def record_stream(self, stream: Stream) -> None:
        assert stream.device == self.device


@dataclass(eq=False)
class Cuda:
    """Devices with a current stream each, on which the banks of a compiled model are in turn.

    Attributes:
        finished: whether what the host asks about is done by now.
        capturing: whether a CUDA graph is being captured.
    """

    devices: tuple[torch.device, ...] = (torch.device("cuda", 0), torch.device("cuda", 1))
    finished: Callable[[], bool] = lambda: False
    capturing: bool = False
    launches: list[Launch] = field(default_factory=list)
    done: frozenset[int] = frozenset()
    current: dict[torch.device, Stream] = field(default_factory=dict)
    streams: dict[tuple[torch.device, int], Stream] = field(default_factory=dict)

    def on(self, number: int) -> None:
        """Have the stream of this number be the current one of each device."""
        for device in self.devices:
            key = device, number
            self.current[device] = self.streams.setdefault(key, self.stream_class(device))

    def launch(self, device: torch.device, slots: Any, *, writes: bool) -> None:
        if self.capturing:
            return
        stream = self.current[device]
        after = stream.after | self.done
        made = Launch(len(self.launches), device, stream, writes, frozenset(slots), after)
        self.launches.append(made)
        stream.after = after | {made.number}

    def clashes(self) -> list[tuple[Launch, Launch]]:
        """Launches of which one writes a slot that the other touches, in no order of their own."""
        return [
            (first, second)
            for second in self.launches
            for first in self.launches[: second.number]
            if first.device == second.device
            and first.slots & second.slots
            and (first.writes or second.writes)
            and first.number not in second.after
        ]

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before = self.current[stream.device]
        self.current[stream.device] = stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    def serve(self, cm: Any, patch: pytest.MonkeyPatch) -> None:
        """Have the compiled model copy adapters on these devices, until the patch is undone."""
        session = self.session = cm._session
        self.stream_class = type("Stream", (Stream,), {"made": self})
        self.on(0)
        groups = session.program.groups
        self.banks = {
            id(group.bank): self.devices[n % len(self.devices)] for n, group in enumerate(groups)
        }
        patch.setattr(torch.cuda, "Stream", self.stream_class)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self.entered)
        for owner in (torch.cuda, torch.accelerator):  # a function each: Dynamo lists them
            patch.setattr(owner, "current_stream", lambda device: self.current[device])
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        for name in ("write", "write_by_column"):
            patch.setattr(Bank, name, self._noting(getattr(Bank, name)))
        tracked = Entry._tracked

        def reading(entry: Entry, run: Any) -> Any:
            self.step(entry.session.program.runtime.rows)
            return tracked(entry, run)

        patch.setattr(Entry, "_tracked", reading)
        memory: Any = [Memory(device) for device in self.devices]
        patch.setattr(session.store, "copy_streams", CopyStreams(memory))
        patch.setattr(session.locks, "streams", Streams())
        patch.setattr(session, "accelerators", self.devices)

    def step(self, rows: tuple[int, ...]) -> None:
        """What reads these slots, those that their adapters take beside them, and the places of
        weights of their own."""
        store, touched = self.session.store, {*filter(lambda row: row >= 0, rows)}
        for name, slot in store.resident.items():
            if slot in rows:
                touched.update(store._window(name, slot))
                if store[name].owned:
                    touched.add(f"own {store._own_places[slot]}")
        for device in self.devices:
            self.launch(device, touched, writes=False)

    def _noting(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def noting(bank: Bank, slot: int, *more: Any) -> Any:
            factors, own, place = (*more, (), None, 0)[:3] if len(more) != 1 else (more[0], None, 0)
            width = max((bank.width(f.rank) for f in factors), default=1)
            touched: list[Any] = [*range(slot, slot + width)]
            if own is not None:
                touched.append(f"own {place}")
            if id(bank) in self.banks:
                self.launch(self.banks[id(bank)], touched, writes=True)
            return write(bank, slot, *more)

        return noting
