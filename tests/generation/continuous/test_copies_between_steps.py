"""Requests that wait have their adapters copied into free slots while a step of others runs."""

from __future__ import annotations

from typing import Any

import pytest
from dense_merge import REFERENCE, Case
from fake_streams import Cuda
from step_logits import serve_checked
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx

pytestmark = pytest.mark.usefixtures("earlier_objects_frozen")

#: A step has room for one of the prompts and a part of the next.
CONFIG = ContinuousBatchingConfig(page_size=4, num_blocks=256, max_batch_tokens=12)
WORK = [([3, 4, 5, 6, 7, 8, 9], "a0"), ([4, 5, 6, 7, 8, 9, 3], "a1"), ([5] * 7, "a3")]


def test_adapters_of_requests_that_wait(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lorafx.LoraConfig(max_adapters=3, max_rank=8)
    cm: Any = lorafx.compile(llama.model(), config, adapters=llama.folders, options=REFERENCE)
    cuda = Cuda()
    cuda.serve(cm, monkeypatch)
    serve_checked(llama, cm, WORK, CONFIG, new=3)
    first = next(n for n, launch in enumerate(cuda.launches) if not launch.writes)
    steps = [launch for launch in cuda.launches if not launch.writes]
    running = {launch.number for launch in steps[: len(cuda.devices)]}
    written = {slot for launch in cuda.launches[:first] for slot in launch.slots}
    ahead = [launch for launch in cuda.launches[first:] if launch.writes]
    assert written < {0, 1, 2}
    assert {slot for launch in ahead for slot in launch.slots} == {0, 1, 2} - written
    assert all(launch.after.isdisjoint(running) for launch in ahead)
    second = steps[len(cuda.devices)].number
    assert all(launch.number < second for launch in ahead)
    assert not cuda.clashes()
    assert cm.stats().loads == 3
