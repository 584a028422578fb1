"""What a session has a GPU do, in the order in which it was asked for.

Calls and writes take turns on the host (`lorafx.session.running.Locks`). What they have launched
goes on after that, and streams of a GPU run side by side: an engine computes its steps on a stream
of its own, while another thread loads an adapter on the default one. So the stream of each turn
waits for that of the turn before it. Only the device waits, and only where the stream is another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorafx.model.sites import Group


class Streams:
    """The streams of the last turn. Whoever takes a turn holds `Locks.calls`."""

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
