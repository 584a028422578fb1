"""Continuous batching: the logits of every step are those of dense merge, request by request."""

from __future__ import annotations

import copy
import gc
import os
import random
import threading
import time
import weakref
from typing import Any

import pytest
import tiny
import torch
import transformers
from dense_merge import REFERENCE, check_mixed
from step_logits import StepLogits, answers, check_logits, decoder, greedy, serve_checked
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from waiting import LONG

import lorafx
from lorafx import BatchError, ConfigError, LoraConfig, UnknownAdapterError
from lorafx.generation.continuous.manager import AdapterBatchingManager

pytestmark = [pytest.mark.any_sizes, pytest.mark.usefixtures("earlier_objects_frozen")]

QWEN3_MOE = decoder(
    "Qwen3Moe",
    [
        ["q_proj", "v_proj"],
        "all-linear",
        ["k_proj"],
        ["o_proj", "lm_head"],
        ["layers.0.self_attn.k_proj"],
    ],
    moe_intermediate_size=20,
    head_dim=10,
    num_experts=4,
    num_experts_per_tok=2,
)

PAGES = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 48}


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
    ("family", "layers", "attention", "page", "lowering"),
    [
        ("llama", 1, "sdpa", 4, "node_by_node"),
        pytest.param("llama", 1, "sdpa", 4, "inductor", marks=pytest.mark.slow),
        pytest.param("llama", 1, "eager", 16, "reference", marks=pytest.mark.slow),
        pytest.param("qwen3", 1, "sdpa", 16, "reference", marks=pytest.mark.slow),
        # One with a window and one without; quickly, in eager mode: test_under_way.
        pytest.param("gemma3", 2, "sdpa", 4, "reference", marks=pytest.mark.slow),
        pytest.param(QWEN3_MOE, 1, "sdpa", 4, "reference", marks=pytest.mark.slow),
    ],
)
def test_logits_of_every_step(
    eight_of, tmp_path, request, family, layers, attention, page, lowering
):
    if lowering == "node_by_node":
        request.getfixturevalue(lowering)
        lowering = "inductor"
    case = eight_of(family, tmp_path, num_hidden_layers=layers)
    case.base.set_attn_implementation(attention)
    cm = case.compile({"lowering": lowering, "dump": str(tmp_path / "dump")})
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
    for graph in (tmp_path / "dump").glob("graph-*"):
        text = (graph / "13-attend.py").read_text()  # attention goes request by request
        assert text.count("lorafx.paged_attention.default") == layers
        assert "lorafx.paged_cache.default" not in text
    assert max(seen.steps) == PAGES["max_batch_tokens"]  # prompts were cut into chunks
    assert cm.stats().tokens["a0"] > 0


CONFIG = ContinuousBatchingConfig(**PAGES)


def serve(engine: Any, work: Any) -> dict[str, Any]:
    """The outputs of (prompt, adapter) pairs, five new tokens each, by the names of requests."""
    ids = [engine.add_request(p, adapter=a, max_new_tokens=5) for p, a in work]
    return answers(engine, ids)


@pytest.mark.usefixtures("road")
def test_a_block_is_shared_only_within_one_version_of_an_adapter(llama, cm):
    prompt = [*range(3, 12)]
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        for name in ("a1", None, "a1", "a3"):  # one after another: all but one could share
            outputs = serve(engine, [(prompt, name)])
            check_logits(llama, seen, outputs, dict.fromkeys(outputs, name))
        # What was not found again was computed: eight tokens of the prompt lie in full blocks.
        prompts = [steps for steps in seen.steps if steps > 1]
        assert prompts == [9, 9, 9]

        cm.load_adapter(llama.folders["a2"], "a1")  # another version, the same prompt
        outputs = serve(engine, [(prompt, "a1")])
        check_logits(llama, seen, outputs, dict.fromkeys(outputs, "a2"))


def test_more_adapters_than_slots_take_turns(in_eager_mode, llama, with_slots):
    cm = with_slots(2)
    before, free = cm.stats(), 2 - len(cm._session.store.resident)
    work = [([5 + i, 6, 7, 8], f"a{i % 8}") for i in range(24)] + [([9, 9], None)] * 2
    serve_checked(llama, cm, work, CONFIG, new=5)
    stats = cm.stats()
    evictions = stats.evictions - before.evictions
    assert evictions >= 6
    assert stats.waits > before.waits
    assert stats.loads - before.loads == evictions + free


def test_requests_keep_the_version_that_they_were_added_with(in_eager_mode, llama, with_slots):
    cm = with_slots(2)
    prompt = [3, 4, 5]
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            old = engine.add_request(prompt, adapter="a1", max_new_tokens=6)
            cm.load_adapter(llama.folders["a3"], "a1")
            new = engine.add_request(prompt, adapter="a1", max_new_tokens=6)
            gone = engine.add_request(prompt, adapter="a2", max_new_tokens=6)
            cm.unload_adapter("a2")
            with pytest.raises(UnknownAdapterError, match="a2"):
                engine.add_request(prompt, adapter="a2")
        outputs = answers(engine, [old, new, gone])
    check_logits(llama, seen, outputs, {old: "a1", new: "a3", gone: "a2"})
    assert "a2" not in cm.adapters
    assert sorted(cm.adapters) == sorted(set(llama.folders) - {"a2"})


def test_sequences_of_one_prompt_keep_its_adapter(llama, cm):
    generation = copy.deepcopy(cm._orig_mod.generation_config)
    generation.num_return_sequences, generation.do_sample = 3, True
    with cm.continuous_batching(generation, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        first = engine.add_request([3, 4, 5, 6, 7, 8], adapter="a1", max_new_tokens=4)
        second = engine.add_request([3, 4, 5, 6, 7, 8], adapter="a3", max_new_tokens=4)
        every = [
            f"{one}{kind}" for one in (first, second) for kind in ("", "__child#0", "__child#1")
        ]
        outputs = answers(engine, every)
    adapters = {name: "a1" if name.startswith(first) else "a3" for name in every}
    check_logits(llama, seen, outputs, adapters)


def test_hooks_and_a_forward_in_place_of_its_own_run_at_each_step(llama, cm):
    own, seen = cm.forward, []

    def forward(*args, **kwargs):
        seen.append("forward")
        output = own(*args, **kwargs)
        output.logits = -output.logits
        return output

    call = ([[3, 4, 5, 6], [7, 8]], ["a1", None], None, CONFIG)
    plain = list(cm.generate_batch(*call, max_new_tokens=1).values())
    handle = cm.register_forward_hook(lambda *_: seen.append("hook"))
    cm.forward = forward
    got = list(cm.generate_batch(*call, max_new_tokens=1).values())
    handle.remove()
    del cm.forward
    assert seen == ["forward", "hook"]
    for output, other, name in zip(got, plain, ["a1", None], strict=True):
        ids = torch.tensor([output.prompt_ids])
        logits = llama.alone(name)(ids).logits[0, -1]
        assert output.generated_tokens == [int(logits.argmin())]
        assert other.generated_tokens == [int(logits.argmax())]


def test_cancelled_requests_and_calls_between_steps(in_eager_mode, llama, cm):
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        dropped = engine.add_request([3, 4, 5], adapter="a1", max_new_tokens=40)
        kept = engine.add_request([3, 4, 6], adapter="a3", max_new_tokens=8)
        engine.cancel_request(dropped)
        check_mixed(cm, llama, ["a1"], inputs)
        outputs = answers(engine, [kept])
    check_logits(llama, seen, outputs, {kept: "a3"})


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_has_no_engine(cm):
    """Nor anybody who would answer what it adds to that of its parent."""
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        child = os.fork()
        if not child:
            status = 1
            try:
                with pytest.raises(BatchError, match="start an engine here"):
                    engine.add_request([3, 4], adapter="a1", max_new_tokens=1)
                assert "forked from" in str(engine.unhealthy())
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert engine.unhealthy() is None


def test_an_engine_of_a_model_that_was_detached(llama):
    cm = llama.compile()
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        cm.detach()
        with pytest.raises(BatchError, match=r"not queued\. this model was detached"):
            engine.add_request([3, 4], adapter=None, max_new_tokens=1)
        assert "detached" in str(engine.unhealthy())


def test_generate_batch(llama, cm):
    prompts, names = [[3, 4, 5], [6, 7], [3, 4, 5]], ["a1", None, "a3"]
    outputs = cm.generate_batch(prompts, names, continuous_batching_config=CONFIG, max_new_tokens=4)
    for output, prompt, name in zip(outputs.values(), prompts, names, strict=True):
        assert prompt + output.generated_tokens == greedy(llama, name, prompt, 4)
    cm.set_adapter("a1")
    (output,) = cm.generate_batch(
        [[3, 4, 5]], continuous_batching_config=CONFIG, max_new_tokens=4
    ).values()
    assert output.generated_tokens == next(iter(outputs.values())).generated_tokens
    assert cm.generate_batch([]) == {}
    with pytest.raises(BatchError, match="2 entries for 1 prompt;"):
        cm.generate_batch([[3]], ["a1", "a2"])
    with pytest.raises(UnknownAdapterError, match="'a11'; nearest: a1"):
        cm.generate_batch([[3]], ["a11"])


def test_garbage_of_others_is_not_looked_for_when_a_batch_ends(cm, monkeypatch):
    """Beside a trainer that takes longer than the batch. The pages are given back."""
    left = weakref.WeakSet()
    start = AdapterBatchingManager.start
    monkeypatch.setattr(
        AdapterBatchingManager,
        "start",
        lambda engine: [start(engine), left.update((engine._processor, engine._processor.cache))],
    )
    gc.unfreeze()
    gc.disable()
    try:
        garbage = Garbage()
        garbage.itself, alive = garbage, weakref.ref(garbage)
        del garbage
        for frozen in (False, True):
            cm.generate_batch([[3, 4]], continuous_batching_config=CONFIG, max_new_tokens=2)
            assert (alive() is not None, len(left)) == (True, frozen)
            assert (gc.get_freeze_count() > 0) == frozen
            gc.freeze()
    finally:
        gc.enable()


class Garbage:
    itself: Garbage


def test_an_idle_engine_is_woken_to_stop(cm):
    with cm.continuous_batching(None, CONFIG) as engine:
        wait, waiting, woken = engine._wake_up_loop.wait, threading.Event(), []

        def wait_long(timeout: float) -> None:
            waiting.set()
            woken.append(wait(LONG))

        engine._wake_up_loop.wait = wait_long
        assert waiting.wait(LONG)
    assert set(woken) == {True}


def test_a_stop_waits_once(in_eager_mode, cm, monkeypatch):
    """For requests with inputs and for those of steps together, not for each."""
    joined = []
    with cm.continuous_batching(None, CONFIG) as engine:
        thread = engine._generation_thread
        join = thread.join

        def note(timeout: float | None = None) -> None:
            joined.append(timeout)
            join(timeout)

        monkeypatch.setattr(thread, "join", note)
        monkeypatch.setattr(engine._with_inputs, "stop", lambda **_: time.sleep(0.2))
        engine.stop(timeout=LONG)
    assert joined[0] <= LONG - 0.2


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph"),
        ({"use_async_batching": True}, "use_async_batching"),
        ({"scheduler_type": "fifos"}, "'fifos'; nearest: fifo"),
    ],
)
def test_what_is_not_served_is_refused(cm, config, text):
    block = cm.continuous_batching(None, ContinuousBatchingConfig(**PAGES, **config))
    with pytest.raises(ConfigError, match=text), block:
        pass


@pytest.mark.usefixtures("in_eager_mode")
def test_a_model_with_flash_attention_has_another_while_an_engine_runs(llama, caplog, monkeypatch):
    """Flash attention is what transformers takes for it: any attention of such a name. What is
    registered here computes on a CPU, and has no package that transformers could load."""
    load = "transformers.modeling_utils.lazy_import_flash_attention"
    monkeypatch.setattr(load, lambda *arguments, **named: None)
    transformers.AttentionInterface.register("flash_of_tests", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("flash_of_tests", sdpa_mask)
    model = llama.model()
    model.set_attn_implementation("flash_of_tests")
    cm = lorafx.compile(model, llama.folders, options=REFERENCE)
    work = [([5, 6, 7, 8], "a1"), ([9, 8], None)]
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        assert model.config._attn_implementation == "sdpa"
        assert (
            "while the engine runs it uses 'sdpa', and 'flash_of_tests' after that" in caplog.text
        )
        with pytest.raises(ConfigError, match="one engine at a time serves a model with flash"):
            cm.generate_batch([[3, 4]], continuous_batching_config=CONFIG)
        assert model.config._attn_implementation == "sdpa"
        outputs = serve(engine, work)
    assert model.config._attn_implementation == "flash_of_tests"
    for (prompt, name), output in zip(work, outputs.values(), strict=True):
        assert prompt + output.generated_tokens == greedy(llama, name, prompt, 5)
    for attention in ("flash_of_tests", "eager"):  # of an engine that never runs
        model.set_attn_implementation(attention)
        engine = AdapterBatchingManager(cm._entries, config=CONFIG)
        assert model.config._attn_implementation != attention
        engine.destroy()
        assert model.config._attn_implementation == attention


def test_a_model_without_a_paged_cache_is_refused():
    """transformers' engine knows no cache for recurrent layers. The model keeps its attention."""
    model = tiny.build(tiny.Family("causal", "qwen3_next", "Qwen3NextForCausalLM"))
    model.set_attn_implementation("eager")
    cm = lorafx.compile(model, LoraConfig(target_modules="all-linear"), options=REFERENCE)
    block = cm.continuous_batching(None, CONFIG)
    text = r"paged cache for Qwen3NextForCausalLM: .*linear_attention.*generate\(\)"
    with pytest.raises(ConfigError, match=text), block:
        pass
    assert model.config._attn_implementation == "eager"


def test_a_model_that_computes_attention_by_itself_is_refused():
    config = transformers.FalconConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.FalconForCausalLM(config).eval()
    cm = lorafx.compile(model, LoraConfig(target_modules="all-linear"), options=REFERENCE)
    with pytest.raises(ConfigError, match="FalconForCausalLM computes attention by itself"):
        cm.generate_batch([[3, 4]], continuous_batching_config=CONFIG)
