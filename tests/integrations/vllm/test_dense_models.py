"""Dense models in vLLM's engine with lorafx's LoRA answer as dense merge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_engine import Served, VllmEngine, prompts, tiny_llama

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return tiny_llama(tmp_path_factory.mktemp("vllm"), adapters=32)


@pytest.fixture(scope="module")
def eager(served: Served) -> Iterator[VllmEngine]:
    """Every adapter in a slot; prompts of more than 64 tokens in chunks."""
    engine = VllmEngine(
        served.model, enforce_eager=True, max_loras=32, max_num_seqs=40, max_num_batched_tokens=64
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def compiled(served: Served) -> Iterator[VllmEngine]:
    """Four slots, in a process of the engine's own; prompts share cached prefixes."""
    engine = VllmEngine(
        served.model,
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        enable_prefix_caching=True,
        block_size=32,
        max_loras=4,
        max_cpu_loras=16,
        max_num_seqs=16,
        max_num_batched_tokens=128,
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("adapters", [0, 1, 8, 32])
def test_mixed_batches(served: Served, eager: VllmEngine, adapters: int) -> None:
    """Rows of the base are among those of adapters, whose ranks and targets are unequal."""
    names = [None, *served.adapters[:adapters], None]
    requests = list(zip(prompts(len(names)), names, strict=True))
    assert eager.run(requests) == served.expected(requests)


def test_compiled_unless_eager(eager: VllmEngine, compiled: VllmEngine) -> None:
    """vLLM alone compiles nothing on a CPU where LoRA is on."""
    assert eager.ask(do="mode") == "NONE"
    assert compiled.ask(do="mode") == "DYNAMO_TRACE_ONCE"


def test_prompts_in_chunks(served: Served, eager: VllmEngine) -> None:
    names = [served.adapters[1], None, served.adapters[2]]
    requests = list(zip(prompts(3, longest=160, seed=5), names, strict=True))
    requests[0] = (prompts(1, seed=7)[0] * 40, served.adapters[1])
    assert len(requests[0][0]) > 64
    assert eager.run(requests) == served.expected(requests)


def test_compiled_with_slots_reused(served: Served, compiled: VllmEngine) -> None:
    """Twelve adapters by turns in four slots of one compiled graph."""
    for group in range(3):
        names = [*served.adapters[4 * group : 4 * group + 4], None]
        requests = list(zip(prompts(5, seed=group), names, strict=True))
        assert compiled.run(requests) == served.expected(requests)


def test_adapters_come_and_go_while_requests_run(served: Served, compiled: VllmEngine) -> None:
    a, b, c, d, e = served.adapters[12:17]
    first, *others = zip(prompts(4, seed=9), [a, b, None, e], strict=True)
    requests = [first, *others]
    events = [(2, "load", c), (3, "load", d), (4, "unload", c), (5, "load", e)]
    made = compiled.run(requests, new=12, at=[0, 1, 2, 6], events=events)
    assert made == served.expected(requests, new=12)


def test_prefixes_are_not_shared_between_adapters(served: Served, compiled: VllmEngine) -> None:
    prompt = prompts(1, longest=140, seed=11)[0] * 40
    names = [None, served.adapters[0], served.adapters[1], None, served.adapters[0]]
    requests = [(prompt[:100], name) for name in names]
    want = served.expected(requests)
    assert compiled.run(requests) == want
    assert compiled.run(requests, at=[0, 3, 6, 9, 12]) == want


def test_bfloat16(served: Served) -> None:
    """Each token is one of the best of the merged model, within what bfloat16 can tell apart."""
    engine = VllmEngine(
        served.model, dtype="bfloat16", max_loras=8, max_num_seqs=16, max_num_batched_tokens=256
    )
    names = [None, *served.adapters[:8]]
    requests = list(zip(prompts(9), names, strict=True))
    made = engine.run(requests)
    engine.close()
    for (prompt, name), tokens in zip(requests, made, strict=True):
        assert served.distance(prompt, name, tokens) < 0.25


def test_fully_sharded_layers(served: Served) -> None:
    engine = VllmEngine(
        served.model,
        fully_sharded_loras=True,
        max_loras=8,
        max_num_seqs=16,
        max_num_batched_tokens=256,
    )
    requests = list(zip(prompts(9), [None, *served.adapters[:8]], strict=True))
    made = engine.run(requests)
    engine.close()
    assert made == served.expected(requests)


def test_switched_off(served: Served, tmp_path: Path) -> None:
    """vLLM's own kernels run, which are right for a batch of one adapter."""
    engine = VllmEngine(
        served.model,
        environment={"LORAFX_VLLM": "off"},
        enforce_eager=True,
        max_loras=1,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    requests = [(prompts(1)[0], served.adapters[0])]
    made = engine.run(requests)
    engine.close()
    assert made == served.expected(requests)
