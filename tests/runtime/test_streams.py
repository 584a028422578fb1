"""Turns on streams of an accelerator: each begins where the one before it has ended. The streams
here only note who waits for whom; tests/gpu/test_gpu_copies.py has a GPU's."""

from __future__ import annotations

import pytest
import torch

from lorafx.runtime.running import Streams

DEVICE, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, Stream]:
    """The current stream of each device, for a test to set."""
    found: dict[torch.device, Stream] = {}
    monkeypatch.setattr(torch.accelerator, "current_stream", found.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_a_turn_on_another_stream_waits_for_the_one_before(current) -> None:
    streams, (first, second) = Streams(), (Stream(), Stream())
    for stream in (first, first, second, second, first):
        current[DEVICE] = stream
        streams.follow([DEVICE])
    assert (first.waited_for, second.waited_for) == ([second], [first])


def test_what_is_captured_waits_for_nothing_and_is_waited_for_by_nobody(
    current, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, (own, capturing) = Streams(), (Stream(), Stream())
    current[DEVICE] = own
    streams.follow([DEVICE])
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        current[DEVICE] = capturing
        streams.follow([DEVICE])
    current[DEVICE] = own
    streams.follow([DEVICE])
    assert (own.waited_for, capturing.waited_for) == ([], [])
