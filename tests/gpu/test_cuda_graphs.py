"""A captured graph stays right when slots, ranks, factors and mixes change at their addresses."""

from __future__ import annotations

import pytest
import torch
from dense_merge import Case
from on_device import (
    TOLERANCE,
    assert_served,
    call_of,
    captured,
    compiled_on,
    kernel_on,
    moved,
    to,
    write,
)
from tiny_models import FAMILIES
from triton_cases import BF16, FP32, STRATEGIES, assert_right, make_case

import lorafx

MIXES = (
    (2, -1, 0, 1, 1, 3, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 0),
    (-1, -1, -1, -1, -1, -1, -1, -1),
    (3, 2, 1, 0, -1, 3, 2, 1),
    (-1, -1, -1, 2, -1, -1, -1, -1),
)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_follow_slots_ranks_and_factors(
    device: torch.device, strategy: str, dtype: torch.dtype, rows: int
) -> None:
    """Captured with one mix and replayed with others: adapters more and fewer, other ranks."""

    def case_of(mix: tuple[int, ...], seed: int):
        return make_case(K=256, sizes=(96, 64), slots=mix, rows=rows, rank=24, capacity=4,
                         dtypes=(dtype,) * 3, seed=seed)  # fmt: skip

    first = case_of(MIXES[0], 0)
    live = moved(first, device)
    # Weight and bias keep their place too; only what changes from step to step is written.
    graph = captured(call_of(live, strategy, kernel_on(live, strategy, device)))
    assert_right(first, strategy, graph.replay().cpu())
    for seed, mix in enumerate(MIXES[1:], 1):
        other = case_of(mix, seed)
        write(live, other)
        now = type(other)(other.problem, first.weight, first.bias, first.transposed)
        assert_right(now, strategy, graph.replay().cpu())


def mixes_of_names(names: list[str]) -> list[list[str | None]]:
    """Five requests: all different, one adapter, none, and some base rows."""
    return [
        [*names[:4], None],
        [names[2]] * 5,
        [None] * 4 + [names[1]],
        [names[3], names[3], names[0], None, names[1]],
    ]


@pytest.mark.parametrize("family", ["plain", "llama"])
def test_a_whole_model_follows_mixes(case_of, device: torch.device, family: str) -> None:
    """The eager call with another mix writes the slots; the captured graph then serves it."""
    case: Case = case_of(family)
    torch.manual_seed(1)
    inputs = FAMILIES[family].inputs(5, 4)
    cm = compiled_on(case, device)
    on_device = to(inputs, device)

    def call(names: list[str | None]) -> torch.Tensor:
        return cm(**on_device, adapter_names=names)["logits"]

    mixes = mixes_of_names(sorted(case.folders))
    graph = captured(lambda: call(mixes[0]))
    graphs = cm.recompiles
    for names in (*mixes, mixes[0]):
        eager = call(names)
        replayed = graph.replay()
        assert_served(eager, case, names, inputs)
        assert (replayed - eager).abs().max() <= TOLERANCE
    assert cm.recompiles == graphs


def test_a_whole_model_follows_adapters_that_take_others_places(
    llama: Case, device: torch.device
) -> None:
    """Two slots and five adapters: each mix overwrites the factors of the one before."""
    torch.manual_seed(1)
    inputs = FAMILIES["llama"].inputs(2, 3)
    config = lorafx.LoraConfig(target_modules=None, max_adapters=2, max_rank=16)
    cm = compiled_on(llama, device, config)
    on_device = to(inputs, device)
    names = sorted(llama.folders)
    pairs = list(zip(names, [*names[1:], None], strict=True))
    graph = captured(lambda: cm(**on_device, adapter_names=list(pairs[0]))["logits"])
    graphs = cm.recompiles
    for pair in pairs:
        cm(**on_device, adapter_names=list(pair))
        assert_served(graph.replay(), llama, list(pair), inputs)
    assert cm.recompiles == graphs
