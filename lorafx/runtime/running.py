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

    def serving(self, requests: Requests) -> Running:
        """Inside of a call for these requests."""
        thread = threading.get_ident()
        return self._replace(requests=requests, depth=self.depth + 1, thread=thread)

    def in_forward(self, rows: tuple[int, ...]) -> Running:
        """Inside of a compiled forward; `rows` are the slots of the batch around it."""
        held = self.held.union(rows) if self.entries else self.held
        return self._replace(entries=self.entries + 1, held=held)

    @property
    def here(self) -> bool:
        """Whether it runs on this very thread."""
        return self.thread == threading.get_ident()


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
    """

    merged: Named | None = None
    broken: str = ""


class Streams:
    """Orders the turns that calls and writes take on accelerators, each on a stream of its own.
    Only the device waits, and only where the stream is another. `Locks.calls` is held."""

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.Stream] = {}

    def follow(self, devices: Sequence[torch.device]) -> None:
        """Have what is launched from now on, on the current stream of each of these accelerators,
        begin when the turn before is done there. Called before slots or base weights are read or
        written."""
        for device in devices:
            stream = torch.accelerator.current_stream(device)
            last = self._last.get(device)
            if last == stream:
                continue
            # A CUDA graph that is being captured cannot wait for what runs now.
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
