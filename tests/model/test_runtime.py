"""Runtime: the batch on the host and in its buffer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lorafx.errors import BatchError
from lorafx.model import runtime as module
from lorafx.model.runtime import Runtime

pytestmark = pytest.mark.quick


def test_runtime_rows():
    runtime = Runtime(3, torch.device("cpu"))
    assert not runtime.active
    assert runtime.slots.tolist() == [-1]
    runtime.set_rows([2, -1, 0])
    assert (runtime.active, runtime.uniform, runtime.rows) == (True, False, (2, -1, 0))
    assert runtime.slots.tolist() == [2, -1, 0]
    assert runtime.slots.dtype == torch.int32
    runtime.set_rows([1, 1])
    assert (runtime.active, runtime.uniform) == (True, True)
    runtime.set_rows([-1, -1])
    assert (runtime.active, runtime.uniform) == (False, True)
    given = torch.tensor([2, -1, 1], dtype=torch.int32)
    runtime.set_rows(given)
    assert (runtime.active, runtime.uniform, runtime.rows) == (True, False, (2, -1, 1))
    given.zero_()
    assert runtime.slots.tolist() == [2, -1, 1]


def test_what_is_captured_writes_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay would write them again."""
    runtime = Runtime(3, torch.device("cpu"))
    runtime.set_rows([0, 1])
    runtime.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    runtime.set_rows([0, 1])
    with pytest.raises(BatchError, match="make the same call right before the capture"):
        runtime.set_rows([0, 2])
    assert runtime.slots.tolist() == [0, 1] == list(runtime.rows)


def test_runtime_writes_in_place_and_grows():
    runtime = Runtime(3, torch.device("cpu"))
    runtime.set_rows([0, 1])
    slots, address = runtime.slots, runtime.slots.data_ptr()
    runtime.set_rows([1, 2])
    assert runtime.slots is slots
    runtime.set_rows([0] * 5)
    assert runtime.slots.data_ptr() == address
    with torch.inference_mode():
        runtime.set_rows([2] * 1000)
    assert runtime.slots.tolist() == [2] * 1000
    runtime.set_rows([1] * 1000)  # an inference tensor could not be written here
    assert runtime.slots.tolist() == [1] * 1000


def test_runtime_refusals_change_nothing():
    runtime = Runtime(3, torch.device("cpu"))
    runtime.set_rows([2, 1])
    with pytest.raises(BatchError, match="request 1 asks for slot 3; slots are 0 to 2, and -1 is"):
        runtime.set_rows([0, 3])
    with pytest.raises(BatchError, match="request 0 asks for slot -2"):
        runtime.set_rows([-2])
    with pytest.raises(BatchError, match="at least one request"):
        runtime.set_rows([])
    assert runtime.rows == (2, 1)
    assert runtime.slots.tolist() == [2, 1]


def test_slots_of_runtimes_that_are_gone_stay_until_the_next_one() -> None:
    """Garbage may be collected while Dynamo iterates over the slots of all runtimes."""
    gone, kept = Runtime(2, torch.device("cpu")), Runtime(2, torch.device("cpu"))
    before = dict(module._SLOTS)
    for index, _ in enumerate(module._SLOTS):
        if index == 0:
            seen = weakref.ref(gone)
            del gone
            gc.collect(1)  # a whole collection takes seconds in a process that has many graphs
            assert seen() is None
    assert dict(module._SLOTS).keys() == before.keys()
    Runtime(2, torch.device("cpu"))
    assert len(module._SLOTS) <= len(before)
    assert kept.slots.tolist() == [-1]
