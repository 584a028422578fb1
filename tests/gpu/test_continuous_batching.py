"""Continuous batching on streams of a GPU: with one step under way while the next is prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case
from on_device import compiled_on
from step_logits import answers, greedy
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx

PAGES = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16}
Work = list[tuple[list[int], str | None]]


def added(engine: Any, work: Work, tokens: int) -> list[str]:
    options = {"max_new_tokens": tokens, "eos_token_id": -1}
    return [engine.add_request(prompt, adapter=name, **options) for prompt, name in work]


def assert_answered(outputs: dict[str, Any], ids: list[str], case: Case, work: Work, tokens: int):
    for request, (prompt, name) in zip(ids, work, strict=True):
        assert outputs[request].error is None, outputs[request].error
        want = greedy(case, name, prompt, tokens)
        assert [*prompt, *outputs[request].generated_tokens][: len(want)] == want


def test_answers(llama: Case, device: torch.device) -> None:
    """Adapters take turns in two slots, and one is replaced while its requests are under way."""
    config = ContinuousBatchingConfig(**PAGES)
    cm = compiled_on(llama, device, lorafx.LoraConfig(max_adapters=2, max_rank=8))
    names = [None, *sorted(llama.folders)]
    work = [([*range(3 + i, 6 + 3 * (i % 6) + i)], names[i % len(names)]) for i in range(24)]
    with cm.continuous_batching(None, config) as engine:
        with engine.pause():
            ids = added(engine, work, 9)
        assert names[1] is not None
        cm.load_adapter(llama.folders[str(names[2])], names[1])
        outputs = answers(engine, ids)
    assert_answered(outputs, ids, llama, work, 9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_goes_request_by_request(
    case_of: Callable[..., Case], device: torch.device, attention: str, tmp_path: Path
) -> None:
    """What torch makes of attention on this device is found in the graph. Its own kernels take
    heads of multiples of eight."""
    llama = case_of("llama", head_dim=8)
    model = llama.model().to(device)
    model.set_attn_implementation(attention)
    cm = lorafx.compile(model, llama.folders, options={"lowering": "triton", "dump": str(tmp_path)})
    work = [([*range(3, 6 + 4 * i)], name) for i, name in enumerate([None, *sorted(llama.folders)])]
    config = ContinuousBatchingConfig(**PAGES)
    with cm.continuous_batching(None, config) as engine:
        graphs = cm.recompiles
        ids = added(engine, work, 5)
        outputs = answers(engine, ids)
    assert cm.recompiles == graphs
    assert_answered(outputs, ids, llama, work, 5)
    layers = llama.base.config.num_hidden_layers
    for graph in tmp_path.glob("graph-*"):
        text = next(graph.glob("*-attend.py")).read_text()
        assert text.count("lorafx.paged_attention.default") == layers
        assert "lorafx.paged_cache.default" not in text


def test_slots_are_written_without_waiting(llama: Case, device: torch.device) -> None:
    """Otherwise the host could not prepare a step while the one before is under way."""
    cm = compiled_on(llama, device)
    runtime = cm._session.program.runtime
    runtime.set_rows([0, 1, -1, 0])
    torch.cuda.synchronize(device)
    torch.cuda._sleep(500_000_000)
    runtime.set_rows([1, 0, 0, -1])
    assert not torch.cuda.current_stream(device).query()
    assert runtime.slots.tolist() == [1, 0, 0, -1]
