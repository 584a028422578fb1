"""Models with routed experts on the device: their deltas are Triton kernels in Inductor's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_models import moe_case
from on_device import assert_served, compiled_on, to
from torch._inductor.utils import run_and_get_code

NAMES = ["params", None, "older", "down", "dense"]


def inputs_of(rows: int, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 100, (rows, length), generator=generator)}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_whole_models(device: torch.device, model_type: str, tmp_path: Path) -> None:
    case = moe_case(model_type, tmp_path)
    cm = compiled_on(case, device)
    inputs = inputs_of(5, 6)
    output, codes = run_and_get_code(
        lambda: cm(**to(inputs, device), adapter_names=NAMES)["logits"]
    )
    assert_served(output, case, NAMES, inputs)
    code = "\n".join(codes)
    assert "torch.ops.lorafx" not in code
    graphs = cm.recompiles
    for names, other in (
        (["older", "down", "params", None, "older"], inputs_of(5, 6, 2)),
        (NAMES, {"input_ids": torch.full((5, 6), 7)}),
    ):
        assert_served(cm(**to(other, device), adapter_names=names)["logits"], case, names, other)
    assert cm.recompiles == graphs
