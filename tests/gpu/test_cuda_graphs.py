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


@pytest.mark.parametrize("family", ["plain", "llama"])
@pytest.mark.parametrize("slots", [5, 2])
def test_a_whole_model_follows_mixes(
    case_of, device: torch.device, family: str, slots: int
) -> None:
    """The eager call with another mix writes the slots, and with two of them the factors of other
    adapters over those of the mix before; the captured graph then serves it."""
    case: Case = case_of(family)
    torch.manual_seed(1)
    inputs = FAMILIES[family].inputs(5, 4)
    config = lorafx.LoraConfig(target_modules=None, max_adapters=slots, max_rank=16)
    cm = compiled_on(case, device, config)
    on_device = to(inputs, device)

    def call(names: list[str | None]) -> torch.Tensor:
        return cm(**on_device, adapter_names=names)["logits"]

    a, b, c, d, *_ = sorted(case.folders)
    pairs: list[list[str | None]] = [[a, b, b, a, None], [c, None, d, c, d], [None] * 4 + [b]]
    mixes = [*pairs, [c] * 5, *([[a, b, c, d, None], [d, d, a, None, b]] if slots > 2 else [])]
    graph = captured(lambda: call(mixes[0]))
    graphs = cm.recompiles
    for names in (*mixes, mixes[0]):
        eager = call(names)
        replayed = graph.replay()
        assert_served(eager, case, names, inputs)
        assert (replayed - eager).abs().max() <= TOLERANCE
    assert cm.recompiles == graphs
