"""Continuous batching: what fails in it fails alone, and the engine serves on."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_merge import REFERENCE, Case, build_case
from safetensors.torch import load_file, save_file
from step_logits import StepLogits, answers, check_logits
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from waiting import LONG

import lorafx
from lorafx import BatchError, ConfigError, MatchError
from lorafx.generation.continuous.failures import IN_A_ROW, in_parts

pytestmark = [pytest.mark.any_sizes, pytest.mark.usefixtures("earlier_objects_frozen")]

PAGES = {"page_size": 4, "num_blocks": 12, "max_batch_tokens": 16}
CONFIG = ContinuousBatchingConfig(**PAGES)
#: Token ids from this one on are not in the table of `limit`.
LIMIT = 50


@pytest.mark.slow
@pytest.mark.one_road  # numbers that overflow do so at another place in eager mode
def test_requests_that_fail_leave_windows_as_they_were(tmp_path) -> None:
    """They come into steps that go on with prompts of others, which were cut into chunks: such a
    chunk overwrites what it reads of the window, of four tokens. Some fail since their adapter is
    refused, one since the model raises for its last token, one since its adapter overflows."""
    case = build_case("gemma3", tmp_path)
    model = case.model()
    limit(model, torch.zeros(LIMIT, model.config.hidden_size))
    folders = {**case.folders, "huge": overflowing(case.folders["a0"], tmp_path / "huge")}
    cm = lorafx.compile(model, folders, options=REFERENCE)
    layer = cm._orig_mod.model.layers[0].self_attn
    plain = type(layer).forward

    class Odd(type(layer)):  # k_proj of a layer with a window is used where LoRA cannot follow
        def forward(self, hidden_states, *args, **kwargs):
            odd = self.k_proj.weight.square().mean() - self.k_proj.weight.square().mean()
            output, *others = plain(self, hidden_states, *args, **kwargs)
            return output + odd, *others

    layer.__class__ = Odd
    touched = [name for name, own in case.folders.items() if touches(own, "0.self_attn.k_proj")]
    assert 0 < len(touched) < len(case.folders)
    fine = [*(name for name in case.folders if name not in touched), None]
    names = [name for pair in pairwise(fine) for name in (*pair, touched[0])]
    config = ContinuousBatchingConfig(**{**PAGES, "num_blocks": 64})
    with cm.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)
        work: dict[str, str | None] = {}
        with engine.pause():
            for i, name in enumerate([*fine[:2], *names]):
                prompt = [*range(3 + i, 14 + i)]
                work[engine.add_request(prompt, adapter=name, max_new_tokens=4)] = name
                if i == 1:
                    beyond = engine.add_request([3, LIMIT], adapter=None, max_new_tokens=4)
            prompt = [*range(20, 40)]
            huge = engine.add_request(prompt, adapter="huge", max_new_tokens=4)
            last = engine.add_request(prompt, adapter=fine[0], max_new_tokens=4)
            work[last] = fine[0]
        outputs = answers(engine, [*work, beyond, huge])
    assert "the logits of its next token are not finite" in outputs.pop(huge).error
    assert "this request failed: the model" in outputs.pop(beyond).error
    for key in [key for key, name in work.items() if name in touched]:
        assert "k_proj" in outputs.pop(key).error
    check_logits(case, seen, outputs, work)


def overflowing(folder: Path, copy: Path) -> Path:
    """A copy of an adapter whose numbers are so large that what is computed from them is not
    finite; of an adapter that touches no k_proj of layer 0, which is refused here."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file(
        {name: tensor * 1e30 for name, tensor in tensors.items()},
        copy / "adapter_model.safetensors",
    )
    return copy


@pytest.mark.usefixtures("road")
def test_an_adapter_that_overflows_fails_alone(llama, cm, tmp_path) -> None:
    """What is not a number is not hidden by a mask, neither in the step nor in the cache."""
    cm.load_adapter(overflowing(llama.folders["a2"], tmp_path / "huge"), "huge")
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        graphs = None
        for _ in range(2):  # pages that have held what is not a number are used again
            with engine.pause():
                work = {
                    engine.add_request(
                        [*range(3 + i, 12 + i)], adapter=name, max_new_tokens=3
                    ): name
                    for i, name in enumerate(("a1", "huge", None))
                }
            outputs = answers(engine, list(work))
            (bad,) = [name for name, adapter in work.items() if adapter == "huge"]
            error = outputs.pop(bad).error
            assert error.startswith("this request failed: the model")
            assert "not finite; look for infinite or very large numbers in its adapter" in error
            check_logits(llama, seen, outputs, work)
            assert graphs in (None, cm.recompiles)  # parts need no graphs of their own
            graphs = cm.recompiles
        for _ in range(IN_A_ROW):  # which is no reason to give up on the engine
            answers(engine, [engine.add_request([3, 4], adapter="huge", max_new_tokens=1)])
        assert engine.unhealthy() is None


def touches(folder: Path, path: str) -> bool:
    return any(path in key for key in load_file(folder / "adapter_model.safetensors"))


def limit(model: Any, table: torch.Tensor) -> None:
    """Have the model add something of a table behind its layers, which lacks the last tokens."""
    inner = model.model
    plain = type(inner).forward

    class Limited(type(inner)):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = plain(self, input_ids, **kwargs)
            output.last_hidden_state = output.last_hidden_state + self.table[input_ids]
            return output

    inner.register_buffer("table", table)
    inner.__class__ = Limited


@pytest.fixture(scope="module")
def limited(llama: Case) -> Case:
    base = copy.deepcopy(llama.base)
    limit(base, base.model.embed_tokens.weight[:LIMIT].flip(0))
    return Case(base, llama.folders)


def test_an_error_of_the_model_fails_the_requests_that_cause_it(limited, caplog) -> None:
    cm = limited.compile()
    eos: dict[str, Any] = {"eos_token_id": -1}
    work: dict[str, str | None] = {}
    outputs = {}
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        for adapter in ("a1", None, "a2") * 2:  # more than the cache holds at once
            with caplog.at_level(logging.ERROR, "lorafx"), engine.pause():
                bad = engine.add_request([3, 4, 5, 6, LIMIT], adapter=adapter, max_new_tokens=1)
                for name in ("a2", None, "a2"):
                    prompt = [7 + len(work), 8]
                    added = engine.add_request(prompt, adapter=name, max_new_tokens=1, **eos)
                    work[added] = name
            outputs |= answers(engine, [*list(work)[-3:], bad])
            error = outputs.pop(bad).error
            assert error.startswith("this request failed: the model")
            assert "is 50, but model.table has 50 entries" in error
        assert caplog.records[-1].exc_info is not None
        assert engine.background_thread_status.can_accept_new_requests() is None
        pool = engine.batch_processor.cache
        assert not engine.batch_processor.scheduler.active_requests
        assert all(not own.block_table for own in pool.cache_allocators.values())
    check_logits(limited, seen, outputs, work)


@pytest.mark.usefixtures("in_eager_mode")
def test_an_engine_that_failed_again_and_again_serves_those_beside_bad_requests(limited) -> None:
    """Somebody sends one request after the other for which the model raises."""
    cm = limited.compile()
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        for _ in range(IN_A_ROW):
            answers(engine, [engine.add_request([3, LIMIT], adapter=None, max_new_tokens=1)])
        assert engine.unhealthy() is not None
        with engine.pause():
            bad = engine.add_request([3, LIMIT], adapter=None, max_new_tokens=1)
            fine = engine.add_request([7, 8], adapter="a1", max_new_tokens=1)
        outputs = answers(engine, [bad, fine])
        assert outputs[bad].error is not None
        assert outputs[fine].error is None
        assert engine.unhealthy() is None


def test_a_merged_adapter_is_served_beside_requests_that_are_refused(llama, cm) -> None:
    """Alone beside tokens of the base it would be refused too."""
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            cm.merge("a1")
            names = ("a3", "a1", None, "a1")
            work = {
                engine.add_request([3 + i, 4, 5], adapter=name, max_new_tokens=3): name
                for i, name in enumerate(names)
            }
        outputs = answers(engine, list(work))
        for name in [name for name, adapter in work.items() if adapter != "a1"]:
            assert "'a1' is merged into the base weights" in outputs.pop(name).error
        cm.unmerge()
    assert len(outputs) == 2
    check_logits(llama, seen, outputs, work)


def test_an_engine_whose_device_is_lost_says_that_it_has_stopped(cm) -> None:
    def lost(**_: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        engine._forward = lost
        name = engine.add_request([3, 4], adapter="a1")
        engine._generation_thread.join(LONG)
        assert not engine.is_running()
        output = engine.output_router.output_queue.get(timeout=1)
        assert (output.request_id, output.error) == (
            name,
            "an illegal memory access was encountered",
        )
        with pytest.raises(BatchError, match=r"not queued.*died with a fatal error") as refused:
            engine.add_request([3, 4], adapter="a1")
        assert isinstance(refused.value.__cause__, torch.AcceleratorError)


@pytest.fixture(scope="module")
def sampling(llama: Case) -> Any:
    """An engine whose requests may say how their tokens are chosen."""
    cm = llama.compile({"start": "eager"})
    generation = copy.deepcopy(cm._orig_mod.generation_config)
    generation.do_sample, generation.temperature = True, 0.9
    generation.top_k, generation.top_p = 5, 0.9
    config = ContinuousBatchingConfig(**PAGES, per_request_processors=True)
    with cm.continuous_batching(generation, config, warmup=False) as engine:
        yield engine


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": "7"},
        {"max_new_tokens": -1},
        {"eos_token_id": "ab"},
        {"eos_token_id": [3, None]},
        {"eos_token_id": torch.tensor(0.5)},
        {"temperature": 10**400},
        {"temperature": float("nan")},
        {"temperature": np.array([0.5, 0.5])},
        {"temperature": torch.tensor(0.5, device="meta")},
        {"top_p": 1.5},
        {"top_k": 0.5},
        {"min_p": -0.1},
        {"top_q": 1},
        {"request_id": ["x"]},
    ],
    ids=str,
)
def test_a_request_that_asks_for_what_cannot_be_is_refused_at_once(sampling, asked) -> None:
    """In a step it would fail the requests beside it, or end the engine."""
    with pytest.raises(ConfigError, match=next(iter(asked))):
        sampling.add_request([3, 4], **{"request_id": "own", "adapter": "a1", **asked})
    assert not sampling._outputs._names
    fine = {"temperature": 0.5, "top_k": 62, "top_p": 0.0}
    one = sampling.add_request([3, 4], "own", adapter="a1", max_new_tokens=2, **fine)
    assert answers(sampling, [one])[one].error is None


ADAPTERS = [3, None, 1, 3, None, 2, 1, 1]


def parts_of(
    adapters: Sequence[int | None], fails: Callable[[Sequence[int]], Exception | None]
) -> tuple[list[Sequence[int]], dict[int, Exception], int]:
    """The parts that are served, why others fail, and how many were tried."""
    tried = 0

    def run(part: Sequence[int]) -> int:
        nonlocal tried
        tried += 1
        error = fails(part)
        if error is not None:
            raise error
        return sum(part)

    whole = fails(range(len(adapters)))
    assert whole is not None
    served, failed = in_parts(adapters, run, whole)
    assert all(result == sum(part) for part, result in served)
    places = [place for part, _ in served for place in part]
    assert sorted([*places, *failed]) == [*range(len(adapters))]  # each once
    return [part for part, _ in served], failed, tried


def test_an_adapter_that_is_refused() -> None:
    """All that it has in the step, without a try for each request."""
    refused = MatchError("refused")
    _, failed, tried = parts_of(
        ADAPTERS, lambda part: refused if any(ADAPTERS[place] == 1 for place in part) else None
    )
    assert failed == dict.fromkeys((2, 6, 7), refused)
    assert tried <= 6


def test_requests_for_which_the_model_raises() -> None:
    _, failed, _ = parts_of(ADAPTERS, lambda part: IndexError() if {0, 6} & {*part} else None)
    assert failed.keys() == {0, 6}


def test_a_mix_that_is_refused_is_served_by_turns() -> None:
    def mixed(part: Sequence[int]) -> Exception | None:
        return MatchError("mix") if {1, 2} <= {ADAPTERS[place] for place in part} else None

    served, failed, _ = parts_of(ADAPTERS, mixed)
    assert not failed
    assert len(served) >= 2


def test_a_step_of_one_adapter_is_not_tried_again() -> None:
    _, failed, tried = parts_of([1, 1, 1], lambda part: MatchError("refused"))
    assert (len(failed), tried) == (3, 0)


def test_errors_of_the_device_are_everybody_s() -> None:
    def lost(part: Sequence[int]) -> Exception:
        return IndexError() if len(part) == len(ADAPTERS) else torch.OutOfMemoryError()

    with pytest.raises(torch.OutOfMemoryError):
        parts_of(ADAPTERS, lost)
