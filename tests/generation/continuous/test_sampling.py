"""How a request's tokens are chosen, and values that ask for nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dense_merge import Case
from step_logits import answers, greedy
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx import ConfigError
from lorafx.generation.continuous.choosing import shares_of
from lorafx.generation.continuous.parameters import Sampling

pytestmark = [pytest.mark.any_sizes, pytest.mark.usefixtures("earlier_objects_frozen")]

CONFIG = ContinuousBatchingConfig(
    page_size=4, num_blocks=64, max_batch_tokens=16, per_request_processors=True
)


def test_each_request_has_its_own_choice() -> None:
    """Beside others in one step, and in a step of its own, which skips what nobody asks for."""
    torch.manual_seed(0)
    scores = torch.randn(7, 20)
    asked = [
        Sampling(temperature=0.5),
        Sampling(top_k=3, temperature=2.0),
        Sampling(),
        Sampling(top_k=-1),
        Sampling(top_k=21),
        Sampling(temperature=4.0, top_p=0.3),
        Sampling(top_k=5, top_p=0.0),
    ]
    want = scores.clone()
    want[0] /= 0.5
    third = scores[1].topk(3).values[-1]
    want[1] = (scores[1] / 2.0).masked_fill(scores[1] < third, -torch.inf)
    order = (scores[5] / 4.0).argsort(descending=True)
    shares = (scores[5] / 4.0).softmax(-1)[order].cumsum(-1)
    out = order[1:][shares[:-1] >= 0.3]
    want[5] = (scores[5] / 4.0).index_fill(0, out, -torch.inf)
    assert 0 < len(out) < 19
    want[6] = torch.full((20,), -torch.inf).index_fill(0, scores[6].argmax(), 0.0)
    torch.testing.assert_close(shares_of(scores, asked), want.softmax(-1))
    for row, sampling in enumerate(asked):
        alone = shares_of(scores[row : row + 1], [sampling])
        torch.testing.assert_close(alone, want[row : row + 1].softmax(-1))


@pytest.fixture(scope="module")
def engines(llama: Case) -> Iterator[dict[str, Any]]:
    """One that draws where a request does not say otherwise, and one that never draws."""
    cm = llama.compile()
    drawing = copy.deepcopy(cm._orig_mod.generation_config)
    drawing.do_sample, drawing.temperature = True, 3.0
    taking = copy.deepcopy(cm._orig_mod.generation_config)
    with (
        cm.continuous_batching(drawing, CONFIG, warmup=False) as first,
        cm.continuous_batching(taking, CONFIG, warmup=False) as second,
    ):
        yield {"draws": first, "takes": second}


@pytest.mark.slow
def test_the_likeliest_token_beside_requests_that_draw(llama, engines) -> None:
    engine = engines["draws"]
    likeliest: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1e-45, "top_k": 0, "top_p": 1},
        {"temperature": 9.0, "top_k": 1},
    ]
    with engine.pause():
        work = [
            engine.add_request([3 + i, 4, 5], adapter=name, max_new_tokens=8, **asked)
            for i, asked in enumerate(likeliest)
            for name in ("a1", None)
        ]
        drawn = engine.add_request([3, 4, 5], adapter="a1", max_new_tokens=40, top_k=0)
    outputs = answers(engine, [*work, drawn])
    for i, name in enumerate(work):
        prompt, own = outputs[name].prompt_ids, (("a1", None)[i % 2])
        assert prompt + outputs[name].generated_tokens == greedy(llama, own, prompt, 8)
    tokens = outputs[drawn].generated_tokens
    assert tokens != greedy(llama, "a1", [3, 4, 5], 40)[3:]
    (alone,) = answers(engine, [engine.add_request([3], max_new_tokens=3, temperature=0)]).values()
    assert [3, *alone.generated_tokens] == greedy(llama, None, [3], 3)  # a step that draws nothing


def test_an_engine_that_takes_the_likeliest_token(engines) -> None:
    for name, value in (("temperature", 0.7), ("min_p", 0.2), ("top_k", -2)):
        with pytest.raises(ConfigError, match=name):
            engines["takes"].add_request([3, 4], **{name: value})
