"""What is under way in a session, in values that are replaced whole; and its locks.

A signal may come between any two calls of functions. So whoever begins something notes it by one
assignment, and takes it back by one: an interrupt finds all of it noted, or nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import torch

from lorafx.errors import CaptureError
from lorafx.interrupts import free_after_fork
from lorafx.runtime.requests import Requests
from lorafx.torch_internals.compat import transform

if TYPE_CHECKING:
    from lorafx.model.sites import Group


class Running(NamedTuple):
    """What is under way.

    Attributes:
        requests: of the innermost call; None outside of any.
        depth: calls that are running, one inside the other.
        entries: compiled forwards that are running, likewise.
        held: slots that the forwards around the innermost go on to read.
        thread: whose calls, or whose update, these are.
        updating: the base weights are being written, and whoever gives the new ones may call the
            model.
        warming: calls only have graphs captured: nothing of their results is used, so what could
            not be served rightly is not refused.
        active: graphs with adapters are captured, though no request has one.
    """

    requests: Requests | None = None
    depth: int = 0
    entries: int = 0
    held: frozenset[int] = frozenset()
    thread: int | None = None
    updating: bool = False
    warming: bool = False
    active: bool = False

    # Every call makes one of each: `_replace` would take three times as long.

    def serving(self, requests: Requests) -> Running:
        """Inside of a call for these requests."""
        _, depth, entries, held, _, updating, warming, active = self
        thread = threading.get_ident()
        return Running(requests, depth + 1, entries, held, thread, updating, warming, active)

    def in_forward(self, rows: tuple[int, ...]) -> Running:
        """Inside of a compiled forward; `rows` are the slots of the batch around it."""
        requests, depth, entries, held, thread, updating, warming, active = self
        held = held.union(rows) if entries else held
        return Running(requests, depth, entries + 1, held, thread, updating, warming, active)

    @property
    def here(self) -> bool:
        """Whether it runs on this very thread."""
        return self.thread == threading.get_ident()


#: Nothing is under way.
IDLE = Running()


class Named(Protocol):
    """What a session knows of the adapter that is merged (lorafx.weights.merge)."""

    @property
    def name(self) -> str: ...


class BaseState(NamedTuple):
    """What the base weights are.

    Attributes:
        merged: the adapter that they hold, None where they are the base's own.
        broken: why they cannot be served, "" where they can.
        unmerged: why calls are refused though the weights are whole: an adapter is merged no
            longer. Says nothing where one is.
    """

    merged: Named | None = None
    broken: str = ""
    unmerged: str = ""


class Streams:
    """Has each turn on an accelerator begin when the turn before it is done there.

    Calls and writes take turns on the host, and what they have launched goes on after that: an
    engine computes its steps on a stream of its own, while another thread loads an adapter on the
    default one. Only the device waits, and only where the stream is another. Whoever takes a turn
    holds `Locks.calls`.
    """

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.Stream] = {}

    def follow(self, devices: Sequence[torch.device]) -> None:
        """Have what is launched from now on, on the current stream of each of these accelerators,
        begin when all is done that was launched on the stream of the turn before.

        For whoever is about to read or write slots or base weights.
        """
        for device in devices:
            stream = torch.accelerator.current_stream(device)
            last = self._last.get(device)
            if last == stream:
                continue
            # What is captured now runs later, when its owner says; it can wait for nothing that
            # runs today.
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue
            if last is not None:
                stream.wait_stream(last)
            # Noted last: an interrupt before it has the next turn wait once more.
            self._last[device] = stream


def accelerators(groups: Iterable[Group]) -> tuple[torch.device, ...]:
    """The devices of the groups' banks that have streams."""
    devices = dict.fromkeys(group.bank.ranks.device for group in groups)
    return tuple(device for device in devices if device.type not in ("cpu", "meta"))


_NUMBERS = itertools.count()


class Locks:
    """Of a session, or of several that take turns.

    Attributes:
        calls: one call at a time: slots and the running call are one state for all marks of the
            model.
        weights: held by what writes the base weights, and by what reads them without stopping
            calls. Taken before `calls` where both are, so that calls go on while somebody waits
            for it.
        streams: on which calls and writes have an accelerator run what they launch.
        number: who takes the locks of several sessions takes those of the least number first, so
            that no two threads wait for one another.
    """

    def __init__(self) -> None:
        self.number: Final = next(_NUMBERS)
        self.calls = threading.RLock()
        self.weights = threading.RLock()
        self.streams: Final = Streams()

    def after_fork(self) -> bool:
        """In a child process: whether calls of another thread of the parent were running, which
        are none of the child's."""
        before = self.calls
        self.calls, self.weights = free_after_fork(before), free_after_fork(self.weights)
        return self.calls is not before


def refuse_transformed() -> None:
    """Raise CaptureError inside of a transform, such as `torch.export` or `make_fx`: tensors
    have no numbers there, and what was written into a slot was written nowhere."""
    found = transform()
    if found is not None:
        raise CaptureError(
            f"lorafx is called inside of {found}, where tensors do not hold the numbers of a call. "
            "Call it outside. To export a model with an adapter, export what export_merged(name, "
            "folder) writes; to map over requests, give them as one batch"
        )
