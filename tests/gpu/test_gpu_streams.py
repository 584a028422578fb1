"""Calls and writes of several streams: none sees slots or weights of a turn that comes later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_merge import Case
from on_device import assert_served, compiled_on, to
from tiny_models import FAMILIES

#: Cycles that the first stream is busy with before its call runs: milliseconds.
BUSY = 50_000_000


@pytest.fixture
def served(llama: Case, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    inputs = FAMILIES["llama"].inputs(2, 3)
    cm = compiled_on(llama, device)
    names = sorted(llama.folders)
    cm(**to(inputs, device), adapter_names=names[:2])  # captured before anything is timed
    torch.cuda.synchronize(device)
    return cm, inputs


def late(device: torch.device, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `call` launches on a stream of its own, which is busy with something else first."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        return call()


def test_a_call_keeps_its_slots(served, llama: Case, device: torch.device) -> None:
    """The slots of rows lie at fixed addresses, which the next call writes."""
    cm, inputs = served
    on_device, names = to(inputs, device), sorted(llama.folders)
    first = late(device, lambda: cm(**on_device, adapter_names=names[:2])["logits"])
    second = cm(**on_device, adapter_names=[names[2], None])["logits"]
    torch.cuda.synchronize(device)
    assert_served(first, llama, names[:2], inputs)
    assert_served(second, llama, [names[2], None], inputs)


def test_a_call_keeps_its_version_of_an_adapter(served, llama: Case, device: torch.device) -> None:
    cm, inputs = served
    on_device, names = to(inputs, device), sorted(llama.folders)
    first = late(device, lambda: cm(**on_device, adapter_names=[names[0], None])["logits"])
    cm.load_adapter(llama.folders[names[1]], names[0])  # in its slot
    second = cm(**on_device, adapter_names=[names[0], None])["logits"]
    torch.cuda.synchronize(device)
    assert_served(first, llama, [names[0], None], inputs)
    assert_served(second, llama, [names[1], None], inputs)


def test_a_call_keeps_its_base_weights(served, llama: Case, device: torch.device) -> None:
    cm, inputs = served
    on_device, names = to(inputs, device), sorted(llama.folders)
    first = late(device, lambda: cm(**on_device, adapter_names=[None, None])["logits"])
    cm.merge(names[0])
    second = cm(**on_device)["logits"]
    torch.cuda.synchronize(device)
    assert_served(first, llama, [None, None], inputs)
    assert_served(second, llama, [names[0]] * 2, inputs)
