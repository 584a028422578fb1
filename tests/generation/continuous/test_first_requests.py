"""Continuous batching: the first requests are answered before there is a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, build_case
from step_logits import StepLogits, answers, check_logits, decoder
from transformers.generation.configuration_utils import ContinuousBatchingConfig

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
    print(cm.status())
    assert cm.recompiles == 0
