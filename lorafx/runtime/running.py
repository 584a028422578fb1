"""What is running in a session, as a value that is only replaced as a whole; and the locks.

A signal may come between any two calls of functions. So what begins is noted by one assignment, and
removed by one: an interrupt finds all of it noted, or nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch

from lorafx.errors import CaptureError
from lorafx.interrupts import free_after_fork
from lorafx.runtime.requests import Requests
from lorafx.torch_internals.transforms import transform

if TYPE_CHECKING:
    from lorafx.model.sites import Group


class Running(NamedTuple):
    """What is running.

    Attributes:
        requests: those of the innermost call; None outside of any call.
        depth: the number of calls that are running, one inside the other.
        entries: the number of compiled forwards that are running, one inside the other.
        slots_in_use: the slots that forwards around the innermost one will read again.
        thread: the identifier of the thread that is in the calls or the update.
        updating: the base weights are being written; what yields the new ones may call the model.
        warming: calls are made to capture graphs, and their results are not used, so nothing is
            refused that could not be served correctly.
        active: graphs with adapters are captured though no request has one.
        inner: the compiled forward that this call is to run next, inside of what users put in the
            place of the compiled model's forward.
    """

    requests: Requests | None = None
    depth: int = 0
    entries: int = 0
    slots_in_use: frozenset[int] = frozenset()
    thread: int | None = None
    updating: bool = False
    warming: bool = False
    active: bool = False
    inner: Callable[..., Any] | None = None

    def serving(self, requests: Requests) -> Running:
        """The value inside of a call for these requests."""
        thread = threading.get_ident()
        depth = self.depth + 1
        return self._replace(requests=requests, depth=depth, thread=thread, inner=None)

    def in_forward(self, rows: tuple[int, ...]) -> Running:
        """The value inside of a compiled forward; `rows` are the slots of the batch around it."""
        slots = self.slots_in_use.union(rows) if self.entries else self.slots_in_use
        return self._replace(entries=self.entries + 1, slots_in_use=slots, inner=None)

    @property
    def here(self) -> bool:
        """Whether the calls or the update run on this thread."""
        return self.thread == threading.get_ident()


IDLE = Running()


class MergedAdapter(Protocol):
    """What a session reads of the adapter that is merged (lorafx.weights.merge)."""

    @property
    def name(self) -> str: ...


class BaseState(NamedTuple):
    """The state of the base weights.

    Attributes:
        merged: the adapter that is merged into them, if any.
        broken: why they cannot be served; "" if they can.
    """

    merged: MergedAdapter | None = None
    broken: str = ""


class Streams:
    """Orders calls and writes on accelerators, which may be on different streams. Only the device
    waits, and only if the stream has changed. The caller holds `Locks.calls`."""

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.Stream] = {}

    def follow(self, devices: Sequence[torch.device]) -> None:
        """Make the current stream of each of these accelerators wait for the work of the last call
        or write. It must be called before slots or base weights are read or written."""
        for device in devices:
            stream = torch.accelerator.current_stream(device)
            last = self._last.get(device)
            if last == stream:
                continue
            # A CUDA graph that is being captured cannot wait for work outside of it.
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue
            if last is not None:
                stream.wait_stream(last)
            # Last, so that after an interrupt the next call waits once more.
            self._last[device] = stream


def accelerators(groups: Iterable[Group]) -> tuple[torch.device, ...]:
    """The devices of the groups' banks, except for those without streams."""
    devices = dict.fromkeys(group.bank.ranks.device for group in groups)
    return tuple(device for device in devices if device.type not in ("cpu", "meta"))


_LOCK_NUMBERS = itertools.count()


class Locks:
    """The locks of a session, or of several sessions that share modules.

    Attributes:
        calls: lets one call run at a time, since the slots and the running call are one state of
            all marks of the model.
        weights: held by what writes the base weights, and by what reads them while calls go on. It
            is taken before `calls`, so that calls go on while a thread waits for it.
        streams: the streams of accelerators on which calls and writes run.
        number: the locks of several sessions are taken in the order of their numbers, so that no
            two threads wait for each other.
    """

    def __init__(self) -> None:
        self.number: Final = next(_LOCK_NUMBERS)
        self.calls = threading.RLock()
        self.weights = threading.RLock()
        self.streams: Final = Streams()

    def after_fork(self) -> bool:
        """Free the locks in a child process. Returns whether another thread of the parent was in a
        call, which does not go on here."""
        before = self.calls
        self.calls, self.weights = free_after_fork(before), free_after_fork(self.weights)
        return self.calls is not before


def refuse_transformed() -> None:
    """Raise CaptureError inside of a transform, such as `torch.export` or `make_fx`: tensors have
    no values there, and writes into slots would be lost."""
    name = transform()
    if name is not None:
        raise CaptureError(
            f"lorafx is called inside of {name}, where tensors do not hold the numbers of a call. "
            "Call it outside. To export a model with an adapter, export what export_merged(name, "
            "folder) writes; to map over requests, give them as one batch"
        )
