"""Continuous batching: the logits of every step are those of dense merge, request by request."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from dense_merge import Case, build_case, save_adapter
from step_logits import StepLogits, answers, check_logits
from tiny_models import Family
from transformers.generation.configuration_utils import ContinuousBatchingConfig

QWEN3_MOE = Family(
    lambda **changes: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **{
                "vocab_size": 61,
                "hidden_size": 24,
                "intermediate_size": 40,
                "moe_intermediate_size": 20,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 10,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 64,
                **changes,
            }
        )
    ),
    (
        ["q_proj", "v_proj"],
        "all-linear",
        ["k_proj"],
        ["o_proj", "lm_head"],
        ["layers.0.self_attn.k_proj"],
    ),
)

PAGES = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 48}


def eight(family: str | Family, folder: Path, **changes: Any) -> Case:
    """A case with adapters a0 to a7."""
    case = build_case(family, folder, **changes)
    for seed in range(5, 8):
        name = f"a{seed}"
        case.folders[name] = save_adapter(
            case.base, folder / name, rank=1 + seed % 4, targets="all-linear", seed=seed
        )
    return case


def requests(count: int, adapters: int, seed: int = 0) -> list[tuple[list[int], str | None, int]]:
    """(prompt, adapter, new tokens) in random order; some prompts begin alike, some are equal."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 61) for _ in range(12)]
    found: list[tuple[list[int], str | None, int]] = []
    for index in range(count):
        own = [draw.randrange(3, 61) for _ in range(draw.randrange(1, 20))]
        prompt = shared[: draw.choice((0, 8, 12))] + own
        if index % 5 == 4:
            prompt = found[-1][0]  # the same tokens, by another adapter
        adapter = draw.choice([None, *(f"a{i}" for i in range(adapters))])
        found.append((prompt, adapter, draw.randrange(1, 7)))
    return found


@pytest.mark.parametrize(
    ("family", "attention", "page", "lowering"),
    [
        ("llama", "sdpa", 4, "inductor"),
        ("llama", "eager", 16, "reference"),
        ("qwen3", "sdpa", 16, "reference"),
        ("gemma3", "sdpa", 4, "reference"),
        (QWEN3_MOE, "sdpa", 4, "reference"),
    ],
)
def test_logits_of_every_step(tmp_path, family, attention, page, lowering):
    case = eight(family, tmp_path)
    case.base.set_attn_implementation(attention)
    cm = case.compile({"lowering": lowering})
    config = ContinuousBatchingConfig(**{**PAGES, "page_size": page})
    work = requests(64, 8)
    with cm.continuous_batching(None, config) as engine:
        graphs = cm.recompiles
        assert graphs <= 4
        seen = StepLogits(engine)
        ids = [
            engine.add_request(prompt, adapter=adapter, max_new_tokens=new)
            for prompt, adapter, new in work
        ]
        outputs = answers(engine, ids)
    check_logits(case, seen, outputs, dict(zip(ids, (w[1] for w in work), strict=True)))
    assert cm.recompiles == graphs
    assert max(seen.steps) == PAGES["max_batch_tokens"]  # prompts were cut into chunks
    assert cm.stats().tokens["a0"] > 0
