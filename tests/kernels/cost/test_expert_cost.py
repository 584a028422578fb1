"""The cost model of routed experts: its limits, its order, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafx.kernels.cost.chips import CHIPS, DEFAULT_CHIP
from lorafx.kernels.cost.expert_cost import EXPERT_STRATEGIES, ExpertWork, estimate_experts

pytestmark = pytest.mark.quick

QWEN3_UP = ExpertWork(2048, (768, 768), 512, 8, 16, torch.bfloat16, experts=128)
QWEN3_DOWN = replace(QWEN3_UP, in_features=768, sizes=(2048,), activation=True)


def best(work: ExpertWork) -> str:
    return next(iter(estimate_experts(work)))


def test_how_many_experts_and_pairs_have_rows() -> None:
    for rows, least, most in ((1, 1, 1), (8, 7, 8), (512, 120, 128), (1 << 20, 127.9, 128)):
        work = replace(QWEN3_UP, rows=rows)
        assert least - 1e-9 <= work.active <= most + 1e-9
        assert work.active - 1e-9 <= work.pairs <= min(rows, 128 * 8) + 1e-9
    assert replace(QWEN3_UP, experts=1, distinct=1).active == 1


def test_decode_is_fused() -> None:
    """64 tokens, each to 8 of 128 experts, 8 adapters."""
    assert best(QWEN3_UP) == "grouped"
    assert best(QWEN3_DOWN) == "activated"


@pytest.mark.parametrize("work", [QWEN3_UP, QWEN3_DOWN])
@pytest.mark.parametrize("rows", [1, 8, 512, 65536])
def test_no_strategy_is_faster_than_the_floor(work: ExpertWork, rows: int) -> None:
    estimates = estimate_experts(replace(work, rows=rows))
    assert set(estimates) == set(EXPERT_STRATEGIES)
    for estimate in estimates.values():
        assert estimate.over_floor >= 1
        assert estimate.seconds > 0


def test_the_vendors_product_stays_where_flops_decide() -> None:
    """Until plain Triton was measured to be as fast; or where the base has no such product."""
    many = replace(QWEN3_UP, rows=1 << 20)
    assert many.compute_bound
    refused = estimate_experts(many)["grouped"].refusal
    assert "0.70 of the vendor GEMM" in refused
    assert best(many) == "segments" or best(many) == "gemv"
    fast = replace(many, chip=replace(DEFAULT_CHIP, triton_over_vendor=0.99))
    assert not estimate_experts(fast)["grouped"].refusal
    unmeasured = replace(many, chip=CHIPS["cuda", 80])
    assert "was not measured" in estimate_experts(unmeasured)["grouped"].refusal
    assert best(replace(many, on_host=True)) == "grouped"


def test_a_loop_on_the_host_costs_its_launches() -> None:
    estimates = estimate_experts(QWEN3_UP), estimate_experts(replace(QWEN3_UP, on_host=True))
    assert estimates[1]["segments"].seconds > estimates[0]["segments"].seconds + 100 * 5e-6
    assert estimates[1]["grouped"].seconds == estimates[0]["grouped"].seconds


def test_an_activation_that_kernels_do_not_know_is_refused() -> None:
    estimate = estimate_experts(QWEN3_UP)["activated"]
    assert "kernels cannot compute its input" in estimate.refusal
    assert list(estimate_experts(QWEN3_UP))[-1] == "activated"
