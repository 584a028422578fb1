"""Kernels of routed experts on the device: against float64, in CUDA graphs whose routing changes,
in Inductor's code, in whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_models import experts_modules, moe_case
from grouped_cases import Experts, assert_right, kernel_of, lora, make_experts
from on_device import assert_served, captured, compiled_on, to
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from triton_cases import BF16, FP16, FP32

BATCHES = {
    "one token": ((0, 0, 1, 0), (3,)),
    "decode": ((2, 0, 3, 1, 0, 4, 17), (0, -1, 2, 1)),
    "all on one expert": ((0, 200, 0), (1, 1, -1, 0)),
    "prefill": ((300, 5, 0, 170), (2, 2, 2, 0, 0, -1)),
}
NAMES = ["params", None, "older", "down", "dense"]


def call_of(case: Experts, device: torch.device, rows_hint: int | None = None):
    """What runs the op on the case's tensors as they are then."""
    kernel = kernel_of(case, device=device, rows_hint=rows_hint)
    live = case.on(device)

    def call() -> Tensor:
        return lora.triton_experts(live.x, live.weight, live.offs, *live.bank, 1, kernel)

    return live, call


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rows_hint", [1, 30, 2000])
def test_mixes(device: torch.device, batch: str, dtype: torch.dtype, rows_hint: int) -> None:
    case = make_experts(
        *BATCHES[batch],
        K=272,
        sizes=(96, 64),
        rank=24,
        dtype=dtype,
        transposed=dtype == BF16,
        tail=3,
    )
    _, call = call_of(case, device, rows_hint)
    assert_right(case, call().cpu())


def test_a_captured_launch_follows_routing_and_mixes(device: torch.device) -> None:
    """Captured with one routing and replayed with others: other experts, adapters, ranks."""

    def case_of(counts: tuple[int, ...], slots: tuple[int, ...], seed: int) -> Experts:
        return make_experts(counts, slots, K=96, sizes=(64,), rank=16, dtype=BF16, seed=seed)

    live, call = call_of(case_of((8, 8, 8, 8), (0, 1, -1, 2), 0), device)
    graph = captured(call)
    weight = live.weight.cpu()
    for seed, (counts, slots) in enumerate(
        (((32, 0, 0, 0), (3, 0)), ((1, 0, 30, 1), (-1,)), ((8, 8, 8, 8), (2, 2, 1)))
    ):
        other = case_of(counts, slots, seed + 1)
        for name in ("x", "offs", "A", "B", "ranks", "scales", "slots", "experts"):
            getattr(live, name).copy_(getattr(other, name))
        assert_right(replace(other, weight=weight), graph.replay().cpu())


def inputs_of(rows: int, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 100, (rows, length), generator=generator)}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_whole_models(device: torch.device, model_type: str, tmp_path: Path) -> None:
    case = moe_case(model_type, tmp_path)
    fused = {"gate_up_proj": "grouped", "down_proj": "grouped"}
    plan = {f"{p}.{name}": s for p, _ in experts_modules(case.base) for name, s in fused.items()}
    cm = compiled_on(case, device, plan=plan)
    inputs = inputs_of(5, 6)
    output, codes = run_and_get_code(
        lambda: cm(**to(inputs, device), adapter_names=NAMES)["logits"]
    )
    assert_served(output, case, NAMES, inputs)
    code = "\n".join(codes)
    assert "torch.ops.lorafx" not in code
    assert "grouped_mm" not in code
    graphs = cm.recompiles
    for names, other in (
        (["older", "down", "params", None, "older"], inputs_of(5, 6, 2)),
        (NAMES, {"input_ids": torch.full((5, 6), 7)}),
    ):
        assert_served(cm(**to(other, device), adapter_names=names)["logits"], case, names, other)
    assert cm.recompiles == graphs
