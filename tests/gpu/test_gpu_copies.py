"""Adapters on their way into slots while a GPU is busy: they arrive meanwhile, and no call reads a
slot too early, has one taken away under it, or sees what a later turn on another stream writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import Case
from on_device import assert_served, compiled_on, to
from tiny_models import FAMILIES

import lorafx

#: Cycles for which a stream is busy: milliseconds, and about a second.
BUSY, LONG = 20_000_000, 2_000_000_000
SLOTS = 3


@pytest.fixture
def served(llama: Case, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    inputs = FAMILIES["llama"].inputs(2, 3)
    config = lorafx.LoraConfig(target_modules=None, max_adapters=SLOTS, max_rank=16)
    cm = compiled_on(llama, device, config)
    # Captured; and what page-locked memory a copy needs is there, to allocate which waits.
    for name in sorted(llama.folders):
        cm(**to(inputs, device), adapter_names=[name, None])
    torch.cuda.synchronize(device)
    return cm, inputs


@pytest.mark.parametrize("changed", ["slots of rows", "adapter", "base weights"])
def test_a_call_keeps_what_it_was_launched_with(
    served, llama: Case, device: torch.device, changed: str
) -> None:
    """The next call and write are launched while its stream is busy with something else first."""
    cm, inputs = served
    on_device, (first, other, *_) = to(inputs, device), sorted(llama.folders)
    names = [None, None] if changed == "base weights" else [first, None]
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        early = cm(**on_device, adapter_names=names)["logits"]
    if changed == "slots of rows":
        late, want = cm(**on_device, adapter_names=[None, other]), [None, other]
    elif changed == "adapter":
        cm.load_adapter(llama.folders[other], first)  # in its slot
        late, want = cm(**on_device, adapter_names=names), [other, None]
    else:
        cm.merge(other)
        late, want = cm(**on_device), [other] * 2
    torch.cuda.synchronize(device)
    assert_served(early, llama, names, inputs)
    assert_served(late["logits"], llama, want, inputs)


@pytest.mark.parametrize("apart", [False, True])
def test_calls_that_are_launched_ahead_read_their_own_adapters(
    served, llama: Case, device: torch.device, apart: bool
) -> None:
    """Each slot is overwritten many times before the first call has begun; `apart`, calls and
    copies are launched from different streams."""
    cm, inputs = served
    on_device, names = to(inputs, device), sorted(llama.folders)
    mixes = [[a, b] for a in names for b in (*names, None) if a != b]
    stream = torch.cuda.Stream(device) if apart else torch.cuda.current_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    answers = []
    for number, mix in enumerate(mixes):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY)
            answers.append(cm(**on_device, adapter_names=mix)["logits"])
        if number % 5 == 4:
            cm.load_adapter(llama.folders[mix[0]], mix[0])
    torch.cuda.synchronize(device)
    for mix, answer in zip(mixes, answers, strict=True):
        assert_served(answer, llama, mix, inputs)
