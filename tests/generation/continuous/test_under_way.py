"""Continuous batching: requests under way while adapters, slots, weights and the cache change, and
requests that cannot be served; the first ones, which are answered before there is a graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, build_case, check_mixed
from step_logits import StepLogits, answers, check_logits, decoder, greedy, serve_checked
from tiny_models import FAMILIES, token_inputs
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from waiting import LONG, wait_until

import lorafx
from lorafx import BatchError, LorafxWarning
from lorafx.torch_internals.versions import saves_graphs

pytestmark = [
    pytest.mark.any_sizes,
    pytest.mark.usefixtures("earlier_objects_frozen"),
    pytest.mark.one_road,
]
PAGES = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 48}
CONFIG = ContinuousBatchingConfig(**PAGES)
SMALL = ContinuousBatchingConfig(**{**PAGES, "num_blocks": 12})


def test_replaced_versions_are_let_go_of(plain):
    cm = plain.compile()
    inputs = FAMILIES["plain"].inputs(2, 4)
    host, hold = cm.memory()["host"], cm._session.store.hold("a1")
    cm.load_adapter(plain.folders["a1"], "a1")
    assert cm.memory()["host"] > host
    cm.warmup(inputs, batch_sizes=(2,))  # beside a replaced version
    del hold
    cm(**inputs, adapter_names=["a2", "a2"])
    assert cm.memory()["host"] == host


@pytest.mark.usefixtures("in_eager_mode")
def test_pinned_adapters_keep_their_slots_among_others_that_take_turns(llama, with_slots):
    cm = with_slots(2)
    cm.pin_adapter("a0")
    work = [([3 + i, 4, 5], f"a{i % 4}") for i in range(8)]
    serve_checked(llama, cm, work, CONFIG, new=20)


def test_requests_fail_where_all_slots_are_pinned_to_others(in_eager_mode, llama, with_slots):
    cm = with_slots(1)
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            late = engine.add_request([3, 4, 5], adapter="a1", max_new_tokens=4)
            fine = [engine.add_request([3, 4], adapter=a, max_new_tokens=4) for a in (None, "a2")]
            cm.pin_adapter("a2")
        outputs = answers(engine, [late, *fine])
    assert "no slot for 'a1'" in outputs.pop(late).error
    check_logits(llama, seen, outputs, dict(zip(fine, (None, "a2"), strict=True)))


def test_blocks_of_earlier_base_weights_are_not_shared(in_eager_mode, llama, cm):
    changed = copy.deepcopy(llama.base)
    torch.manual_seed(5)
    for parameter in changed.parameters():
        parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    prompt = [*range(3, 20)]
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        for case in (llama, Case(changed, llama.folders)):
            names = ("a1", None, "a1")
            for name in names:
                outputs = answers(
                    engine, [engine.add_request(prompt, adapter=name, max_new_tokens=3)]
                )
                check_logits(case, seen, outputs, dict.fromkeys(outputs, name))
            cm.load_weights(dict(changed.named_parameters()).items())
    cm.load_weights(dict(llama.base.named_parameters()).items())
    assert [steps for steps in seen.steps if steps > 1] == [17, 17, 17, 17]


def test_further_sequences_fail_with_their_request(llama):
    """The model reads what is not known to be of one request."""
    cm = llama.compile(dynamic=False)
    layer = cm._orig_mod.model.layers[0].self_attn
    plain = type(layer).forward

    class Shuffled(type(layer)):
        def forward(self, hidden_states, *args, **kwargs):
            return plain(self, hidden_states.cumsum(1), *args, **kwargs)

    layer.__class__ = Shuffled
    generation = copy.deepcopy(cm._orig_mod.generation_config)
    generation.num_return_sequences, generation.do_sample = 2, True
    with pytest.warns(LorafxWarning, match="4 of 4 requests failed"):
        outputs = cm.generate_batch(
            [[3, 4, 5], [3, 4, 6]], ["a1", "a3"], generation, CONFIG, max_new_tokens=2
        )
    assert all("not proved" in output.error for output in outputs.values())


def test_a_name_serves_one_request_at_a_time(in_eager_mode, llama, cm):
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            engine.add_request([3, 4, 5], "x", adapter="a1", max_new_tokens=4)
            with pytest.raises(BatchError, match="named 'x' is under way"):
                engine.add_request([3, 4, 5, 6], "x", adapter="a3")
            engine.add_request([3, 4], "y", adapter="a3", max_new_tokens=4)
            engine.cancel_request("y")
        outputs = answers(engine, ["x"])
        check_logits(llama, seen, outputs, {"x": "a1"})
        for name in ("x", "y"):  # answered, and cancelled
            seen.rows.pop(name, None)
            engine.add_request([3, 4, 5, 6], name, adapter="a3", max_new_tokens=4)
        check_logits(llama, seen, answers(engine, ["x", "y"]), dict.fromkeys("xy", "a3"))


def test_prompts_that_are_no_token_ids_are_refused(in_eager_mode, cm):
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        for prompt in ([], [3, 1000], [3, -5], "abc", [3.5]):
            with pytest.raises(BatchError, match="input_ids"):
                engine.add_request(prompt, adapter="a1")
        assert not engine._outputs._names


def test_what_waits_for_a_slot_makes_room_in_the_cache(in_eager_mode, llama, with_slots):
    cm = with_slots(1)
    names = {}
    with cm.continuous_batching(None, SMALL, warmup=False) as engine:
        with engine.pause():
            for first, adapter in ((3, "a1"), (4, "a3")):
                prompt = [*range(first, first + 27)]
                names[engine.add_request(prompt, adapter=adapter, max_new_tokens=18)] = adapter
            huge = engine.add_request([3] * 100, adapter="a1", max_new_tokens=18)
        outputs = answers(engine, [*names, huge])
        assert engine.is_running()
    assert "does not fit into the cache" in outputs.pop(huge).error
    for name, output in outputs.items():
        assert output.error is None
        want = greedy(llama, names[name], output.prompt_ids, 18)
        assert output.prompt_ids + output.generated_tokens == want


def test_requests_that_are_left_after_the_timeout_fail(in_eager_mode, cm):
    with cm.continuous_batching(None, CONFIG, warmup=False, timeout=0.1) as engine:
        added = engine.add_request([3, 4, 5], adapter="a1", max_new_tokens=800, eos_token_id=-1)
    output = engine.output_router.output_queue.get(timeout=1)
    assert output.request_id == added
    assert "finished before this request" in output.error
    assert engine._packed.pages is None  # the cache is not kept by the engine's object


GEMMA2 = decoder(
    "Gemma2",
    [["q_proj"], "all-linear", ["k_proj"], ["o_proj"], ["v_proj"]],
    head_dim=6,
    query_pre_attn_scalar=6,
    sliding_window=8,
    attn_logit_softcapping=2.0,
)
GPT_OSS = decoder(
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
    "family",
    [
        pytest.param(GEMMA2, id="capped scores", marks=pytest.mark.slow),
        pytest.param(GPT_OSS, id="sinks", marks=pytest.mark.slow),
    ],
)
def test_eager_attention(family, tmp_path):
    """One engine at a time uses it; calls beside it use the model's own."""
    case = build_case(family, tmp_path)
    with torch.no_grad():
        for name, parameter in case.base.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    case.base.set_attn_implementation("eager")
    cm = case.compile()
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        with (
            pytest.raises(lorafx.ConfigError, match="one engine at a time"),
            cm.continuous_batching(),
        ):
            pass
        seen = StepLogits(engine)
        work = [([*range(3 + i, 9 + 3 * i)], f"a{i}") for i in range(5)]
        ids = [engine.add_request(p, adapter=a, max_new_tokens=4) for p, a in work]
        if family is GEMMA2:
            check_mixed(cm, case, ["a1", None, "a2"], token_inputs(3, 5))
        assert cm._orig_mod.config._attn_implementation == "paged|eager"
        outputs = answers(engine, ids)
    check_logits(case, seen, outputs, dict(zip(ids, (a for _, a in work), strict=True)))
    assert cm._orig_mod.config._attn_implementation == "eager"


EAGER = {**REFERENCE, "start": "eager", "cache": None}


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), (GPT_OSS, "eager")],
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


@pytest.mark.slow
@pytest.mark.skipif(not saves_graphs(), reason="this torch cannot save graphs")
def test_graphs_take_over_between_steps(compiled_beside, llama) -> None:
    """They are compiled beside from the engine's start on; requests are answered meanwhile, and
    one that is under way changes tiers."""
    cm = llama.compile(EAGER)
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
        wait_until(lambda: len(seen.steps) >= 5 or not engine.is_running())
        assert cm.status().progress == "compiling: 0 of 2 graphs"
        with engine.pause():
            eager = len(seen.steps)
            assert cm.wait(LONG)
            assert cm.recompiles == 0
        outputs = answers(engine, list(ids))
    check_logits(llama, seen, outputs, ids)
    assert 5 <= eager < len(seen.steps)
    assert cm.recompiles >= 1
    assert "ready" in {kind.tier for kind in cm.status().kinds}
