"""Inductor, CUDA graphs of its own, and ahead-of-time packages around the generated kernels."""

from __future__ import annotations

import pytest
import torch
from dense_merge import Case
from on_device import assert_served, call_of, compiled_on, kernel_on, moved, to, write
from tiny_models import FAMILIES
from torch._inductor.utils import run_and_get_code
from triton_cases import BF16, STRATEGIES, assert_right, make_case

import lorafx

NAMES = ["a1", None, "a3", "a0", "a2"]
MIX = (2, -1, 0, 1, 1, 3, 0, 0)
OTHER = (-1, 3, 3, 3, 0, 2, -1, 1)


def case_of(mix: tuple[int, ...], seed: int = 0):
    return make_case(K=256, sizes=(96, 64), slots=mix, rank=16, capacity=4, dtypes=(BF16,) * 3,
                     seed=seed)  # fmt: skip


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torch_compile_modes(device: torch.device, strategy: str, mode: str | None) -> None:
    first = case_of(MIX)
    live = moved(first, device)
    call = call_of(live, strategy, kernel_on(live, strategy, device))
    compiled = torch.compile(call, mode=mode, fullgraph=True)
    for _ in range(3):  # warm-up, capture, replay
        assert_right(first, strategy, compiled().clone().cpu())
    other = case_of(OTHER, 1)
    write(live, other)
    now = type(other)(other.problem, first.weight, first.bias, first.transposed)
    assert_right(now, strategy, compiled().clone().cpu())


def test_the_kernels_are_in_inductors_code(llama: Case, device: torch.device) -> None:
    torch.manual_seed(1)
    inputs = FAMILIES["llama"].inputs(5, 4)
    cm = compiled_on(llama, device)
    output, codes = run_and_get_code(
        lambda: cm(**to(inputs, device), adapter_names=NAMES)["logits"]
    )
    assert_served(output, llama, NAMES, inputs)
    code = "\n".join(codes)
    assert "custom_kernel=True" in code
    assert "torch.ops.lorafx" not in code
    if torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        assert "launch_pdl" in code


@pytest.mark.parametrize("family", ["plain", "llama", "gpt2"])
def test_whole_models(case_of, device: torch.device, family: str) -> None:
    case: Case = case_of(family)
    torch.manual_seed(1)
    cm = compiled_on(case, device)
    graphs = None
    for rows, length in ((5, 4), (5, 1), (3, 7)):
        inputs = FAMILIES[family].inputs(rows, length)
        names = NAMES[:rows]
        assert_served(cm(**to(inputs, device), adapter_names=names)["logits"], case, names, inputs)
        again = [None, *names[1:]]
        got = cm(**to(inputs, device), adapter_names=again)["logits"]
        assert_served(got, case, again, inputs)
        graphs = graphs or cm.recompiles
    assert cm.recompiles <= graphs + 1  # one token is a graph of its own


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_backend_with_modes(llama: Case, device: torch.device, mode: str) -> None:
    torch.manual_seed(1)
    inputs = FAMILIES["llama"].inputs(5, 4)
    options = {"mode": mode}
    model = lorafx.attach(llama.model().to(device), llama.folders, options=options)
    compiled = torch.compile(model, backend="lorafx")
    with torch.no_grad():
        for names in (NAMES, NAMES, NAMES, ["a4"] * 5, [None, "a0", "a0", "a1", None]):
            with lorafx.adapters(model, names):
                got = compiled(**to(inputs, device))["logits"].clone()
            assert_served(got, llama, names, inputs)
