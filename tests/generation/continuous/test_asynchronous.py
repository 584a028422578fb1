"""Asynchronous batching: a step is launched before it is known what came of the one before.

Streams stand in here that run what they are given at once, so what is tested is the host's part:
which tokens, slots and failures are whose. On a GPU: tests/gpu/test_continuous_batching.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_merge import Case
from step_logits import StepLogits, answers, check_logits, greedy
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import (
    continuous_api,
    input_outputs,
    model_runner,
    offloading_manager,
)

from lorafx.generation.continuous.scheduling import Pairs

pytestmark = pytest.mark.usefixtures("earlier_objects_frozen")

PAGES = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16}
CONFIG = ContinuousBatchingConfig(**PAGES, use_async_batching=True)


class AtOnce:
    """A stream, or an event of one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: AtOnce) -> None: ...

    def wait_event(self, event: AtOnce) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = input_outputs.ContinuousBatchingAsyncIOs
    monkeypatch.setattr(cls, "_supported_device_types", ("cpu",))
    monkeypatch.setattr(input_outputs, "create_device_stream", AtOnce)
    monkeypatch.setattr(torch, "Event", AtOnce)
    for module in (continuous_api, input_outputs, model_runner, offloading_manager):
        monkeypatch.setattr(module, "stream_context", lambda _: nullcontext())


def trimmed(seen: StepLogits, outputs: dict[str, Any]) -> int:
    """Take away the logits of tokens that nobody waited for, since their request had ended; how
    many there were."""
    more = 0
    for name, output in outputs.items():
        count = len(output.generated_tokens)
        more += len(seen.rows[name]) - count
        del seen.rows[name][count:]
    return more


def test_logits_of_every_step(llama: Case, with_slots, streams) -> None:
    """Eight adapters take turns in two slots, and prompts are cut into chunks."""
    cm = with_slots(2)
    work = [([*range(3 + i, 6 + 3 * (i % 6) + i)], f"a{i % 8}", 1 + i % 5) for i in range(24)]
    work += [([5, 6, 7 + i], None, 3) for i in range(3)]
    with cm.continuous_batching(None, CONFIG) as engine:
        assert engine.batch_processor.use_async_batching
        graphs = cm.recompiles
        seen = StepLogits(engine)
        with engine.pause():
            ids = [
                engine.add_request(prompt, adapter=name, max_new_tokens=new, eos_token_id=-1)
                for prompt, name, new in work
            ]
        outputs = answers(engine, ids)
    assert trimmed(seen, outputs) > 10  # it did not wait for a step before it launched the next
    check_logits(llama, seen, outputs, dict(zip(ids, (w[1] for w in work), strict=True)))
    assert cm.recompiles == graphs
    assert cm.stats().evictions > 0


def test_requests_that_fail_while_a_step_is_under_way(llama: Case, cm, streams) -> None:
    """One step fails as a whole, and its requests with it; another one in part."""
    eos: dict[str, Any] = {"eos_token_id": -1, "max_new_tokens": 9}
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        packed = engine._forward
        steps = 0

        class Failing(StepLogits):
            def __call__(self, **batch: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == 4:
                    raise IndexError("broken")
                output = super().__call__(**batch)
                if steps == 12:
                    packed.failed = {"second 1": IndexError("odd")}
                return output

        Failing(engine)
        first = [engine.add_request([3, 4], f"first {i}", adapter="a1", **eos) for i in range(2)]
        for output in answers(engine, first).values():
            assert "IndexError: broken" in output.error
            assert len(output.generated_tokens) <= 3
        steps = 4
        with engine.pause():
            second = [
                engine.add_request([3 + i, 4, 5], f"second {i}", adapter=name, **eos)
                for i, name in enumerate(("a1", "a3", None))
            ]
        outputs = answers(engine, second)
        assert not engine.batch_processor.scheduler.active_requests
        assert engine.output_router.output_queue.empty()
    assert engine.health.failed == 1
    errors = [output.error for output in outputs.values()]
    assert "IndexError: odd" in errors[1]
    assert errors[0] is errors[2] is None
    for name, adapter, first_token in zip(second, ("a1", "a3", None), (3, 4, 5), strict=True):
        got = [first_token, 4, 5, *outputs[name].generated_tokens]
        assert got == greedy(llama, adapter, [first_token, 4, 5], 9)[: len(got)]


def test_nothing_comes_of_a_request_that_was_cancelled(llama: Case, cm, streams) -> None:
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        for i in range(4):
            engine.add_request([3, 4], "x", adapter="a1", max_new_tokens=90, streaming=True)
            output = engine.get_result(timeout=60)
            assert output.request_id == "x"
            engine.cancel_request("x")
            added = engine.add_request([5 + i, 4], f"y{i}", adapter="a3", max_new_tokens=4)
            while (output := engine.get_result(timeout=60)).request_id == "x":
                assert not output.is_finished()
            assert output.request_id == added
            want = greedy(llama, "a3", [5 + i, 4], 4)
            assert [5 + i, 4, *output.generated_tokens] == want
            assert engine.output_router.output_queue.empty()


def test_a_token_is_carried_over_to_its_own_request() -> None:
    """A request of the same name may have come meanwhile."""

    def step(*requests: tuple[Any, int]) -> Any:
        batch = [SimpleNamespace(state=state) for state, _ in requests]
        positions = {state.request_id: position for state, position in requests}
        host = SimpleNamespace(requests_in_batch=batch, req_id_to_new_token_position=positions)
        return SimpleNamespace(host_io=host)

    old, new, other = (SimpleNamespace(request_id=name) for name in ("x", "x", "y"))
    pairs: Any = object.__new__(Pairs)
    pairs.current_pair, pairs.max_batch_tokens = 1, 6
    pairs.io_pairs = [step((old, 0), (other, 1)), step((new, 3), (other, 4))]
    assert pairs.infer_carry_over_ids().tolist() == [-1, -1, -1, -1, 1, -1]
    assert pairs.io_pairs[1].host_io.req_id_to_new_token_position == {"x": 3, "y": 4}
