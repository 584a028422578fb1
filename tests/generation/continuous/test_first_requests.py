"""Continuous batching: the first requests are answered before there is a graph."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, build_case
from step_logits import StepLogits, answers, check_logits, decoder
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.torch_internals.versions import saves_graphs

EAGER = {**REFERENCE, "start": "eager", "cache": None}
CONFIG = ContinuousBatchingConfig(page_size=4, num_blocks=256, max_batch_tokens=12)
SINKS = decoder(
    "GptOss",
    [["q_proj"], ["v_proj"], ["k_proj"], ["o_proj"], ["q_proj", "v_proj"]],
    intermediate_size=20,
    head_dim=10,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), (SINKS, "eager")],
)
def test_first_requests(tmp_path: Path, family: Any, attention: str) -> None:
    """Prompts in chunks, windows, adapters and the base beside each other."""
    case = build_case(family, tmp_path)
    with torch.no_grad():
        for name, parameter in case.base.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    case.base.set_attn_implementation(attention)
    cm = case.compile(EAGER)
    work = {
        i: ([*range(3 + i, 7 + 4 * i)], name)
        for i, name in enumerate(["a1", None, "a0", "a2", "a3", "a1", "a4"])
    }
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            ids = {engine.add_request(p, adapter=a, max_new_tokens=5): a for p, a in work.values()}
        outputs = answers(engine, list(ids))
    check_logits(case, seen, outputs, ids)
    assert cm.recompiles == 0


@pytest.mark.skipif(not saves_graphs(), reason="this torch cannot save graphs")
def test_graphs_take_over_between_steps(llama) -> None:
    """They are compiled beside from the engine's start on; requests are answered meanwhile, and
    one that is under way changes tiers."""
    cm = llama.compile({**EAGER, "lowering": "inductor"})
    with cm.continuous_batching(None, CONFIG) as engine:
        assert cm.recompiles == 0
        seen = StepLogits(engine)
        ids = {}
        for i, name in enumerate(["a1", None, "a0", "a2"]):
            prompt = [*range(3 + i, 9 + 3 * i)]
            added = engine.add_request(
                prompt, adapter=name, max_new_tokens=100 - i, eos_token_id=-1
            )
            ids[added] = name
        while len(seen.steps) < 5:
            assert engine.is_running()
            time.sleep(0.001)
        assert cm.status().progress == "compiling: 0 of 2 graphs"
        with engine.pause():
            eager = len(seen.steps)
            assert cm.wait(300)
            assert cm.recompiles == 0
        outputs = answers(engine, list(ids))
    check_logits(llama, seen, outputs, ids)
    assert 5 <= eager < len(seen.steps)
    assert cm.recompiles == 1
    assert "ready" in {kind.tier for kind in cm.status().kinds}
