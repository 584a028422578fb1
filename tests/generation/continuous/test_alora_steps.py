"""aLoRA in continuous batching: each request is PEFT's own output for it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from alora_cases import Served
from dense_merge import TOLERANCE, error
from step_logits import StepLogits, answers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

pytestmark = [
    pytest.mark.any_sizes,
    pytest.mark.usefixtures("earlier_objects_frozen"),
    pytest.mark.filterwarnings("ignore:.*do not occur.*:lorafx.LorafxWarning"),
]

PAGES = {"page_size": 4, "num_blocks": 128, "max_batch_tokens": 24}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Served:
    return Served("llama", tmp_path_factory.mktemp("adapters"))


def check_engine(
    served: Served, seen: StepLogits, outputs: dict[str, Any], names: Sequence[str | None]
) -> None:
    for (key, output), name in zip(outputs.items(), names, strict=True):
        assert output.error is None, output.error
        prompt, generated = output.prompt_ids, output.generated_tokens
        want = served.generated(
            name,
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )
        assert generated == want.sequences[0, len(prompt) :].tolist()
        got = torch.stack(seen.rows[key])
        assert error(got, torch.cat(want.logits)) <= TOLERANCE


def test_continuous_batching(llama) -> None:
    """Prompts in chunks, shared beginnings, invocations that end at each place of a block."""
    shared = [*range(10, 22)]
    work: list[tuple[list[int], str | None]] = []
    for extra in range(5):
        prompt = [*shared, *range(30, 30 + extra)]
        work += [([*prompt, 5, 6, 40], "x"), ([*prompt, 7], "y"), ([*prompt, 7], None)]
        work += [([*prompt, 5, 6, 40, 5, 6, 41], "x"), ([*prompt, 41], "x"), (prompt, "plain")]
    with llama.cm.continuous_batching(None, ContinuousBatchingConfig(**PAGES)) as engine:
        graphs = llama.cm.recompiles
        seen = StepLogits(engine)
        ids = [engine.add_request(p, adapter=a, max_new_tokens=5, eos_token_id=[]) for p, a in work]
        outputs = answers(engine, ids)
        check_engine(llama, seen, outputs, [name for _, name in work])
        assert llama.cm.recompiles == graphs


def test_blocks_before_the_invocation_are_the_base_s(llama) -> None:
    prompt = [*range(10, 22)]  # three blocks
    asked = [*prompt, 30, 31, 32, 7, 40]
    config = ContinuousBatchingConfig(**PAGES)
    with llama.cm.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)

        def serve(tokens: list[int], name: str | None) -> tuple[int, Any]:
            """How many tokens of the prompt were computed, and the output."""
            before = len(seen.steps)
            key = engine.add_request(tokens, adapter=name, max_new_tokens=5, eos_token_id=[])
            outputs = answers(engine, [key])
            check_engine(llama, seen, outputs, [name])
            return seen.steps[before], outputs[key]

        assert serve([*prompt, 50], None)[0] == 13
        computed, output = serve(asked, "y")
        assert computed == 5  # the base's blocks
        assert serve(asked, "y")[0] == 1  # and its own, in which it begins
        # The same tokens, but now its adapter begins at the last of them.
        assert serve([*asked, *output.generated_tokens[:3], 7, 9], "y")[0] == 10
        assert serve([*prompt, 5, 6, 41], "x")[0] == 7  # the block before its tokens is marked
