"""The generated Triton kernels of `lorafx::paged_attention`, in Triton's interpreter, against the
attention of each request by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_only_gpu import compile_only_gpu
from dense_merge import error
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_steps import TOLERANCE, paged_step
from torch import Tensor

from lorafx.kernels.ops.paged_attention import PagedStep, by_request
from lorafx.kernels.triton import attention as module
from lorafx.kernels.triton.attention import FEW, PagedAttentionSpec, attend
from lorafx.kernels.triton.generated import GeneratedKernel, launch_interpreted
from lorafx.kernels.triton.tiles import ARCHITECTURES, Architecture

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def spec_of(call: dict[str, Any]) -> PagedAttentionSpec:
    spec = PagedAttentionSpec.of(PagedStep(**call))
    assert spec is not None
    return spec


def run(
    call: dict[str, Any],
    launch: Any = launch_interpreted,
    arch: Architecture = ARCHITECTURES["interpreter"],
    **how: Any,
) -> Tensor:
    return attend(launch, arch, spec_of(call), PagedStep(**call), **how)


def check(call: dict[str, Any], **how: Any) -> None:
    expected = {**call, "cache": call["cache"].clone()}
    want = by_request(PagedStep(**expected))
    got = run(call, **how)
    assert got.dtype == want.dtype
    assert got.transpose(1, 2).is_contiguous()
    assert error(got.double(), want.double()) <= TOLERANCE[got.dtype]
    assert torch.equal(call["cache"], expected["cache"])


#: (new tokens, those before) of each request: decode, a first token, a chunk, a short prompt.
MIXED = [(1, 18), (1, 0), (1, 34), (5, 3), (2, 0)]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "parts": (3, {}),
    "groups of four, size 80": (1, {"group": 4, "size": 80, "page": 16}),
    "groups of eight, size 64, bfloat16": (2, {"group": 8, "size": 64, "dtype": BF16, "heads": 1}),
    "groups of three, size 128, float16": (1, {"group": 3, "size": 128, "dtype": FP16, "heads": 1}),
    "windows": (1, {"window": 5, "group": 2}),
    "caps and sinks": (1, {"cap": 0.5, "sinks": True, "dtype": BF16, "size": 32}),
    "windows, caps and sinks": (2, {"window": 9, "cap": 0.5, "sinks": True, "padding": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_mixed_steps(case: str) -> None:
    """Of requests that decode beside chunks of prompts; with keys in parts and without."""
    parts, changes = CASES[case]
    check(paged_step(MIXED, **changes), parts=parts)


@settings(max_examples=8)
@given(data=st.data())
def test_any_step(data: st.DataObject) -> None:
    request = st.tuples(st.integers(1, 6), st.integers(0, 40))
    window = data.draw(st.sampled_from([0, 0, 1, 7]), label="window")
    call = paged_step(
        data.draw(st.lists(request, min_size=1, max_size=3), label="requests"),
        dtype=data.draw(st.sampled_from([FP32, BF16, FP16]), label="dtype"),
        heads=data.draw(st.integers(1, 2), label="heads"),
        group=data.draw(st.sampled_from([1, 3, 4, 8]), label="group"),
        size=data.draw(st.sampled_from([10, 16, 33]), label="size"),
        page=data.draw(st.sampled_from([4, 16]), label="page"),
        window=window,
        cap=data.draw(st.sampled_from([0.0, 2.0]), label="cap"),
        sinks=data.draw(st.booleans(), label="sinks"),
        padding=data.draw(st.integers(0, 2), label="padding"),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )
    check(call, parts=data.draw(st.sampled_from([1, 2, 5]), label="parts"))


def test_what_is_no_number_stays_with_its_request() -> None:
    call = paged_step([(1, 18), (6, 3), (1, 4)])
    call["key"][:, :, 0] = torch.nan
    call["value"][:, :, 7] = torch.inf
    got = run(call)
    assert got[:, :, 0].isnan().all()
    assert got[:, :, 1:7].isfinite().all()
    assert not got[:, :, 7].isfinite().any()


def test_rows_outside_of_the_cache() -> None:
    """Neither read nor written: who sees them gets what is no number, and nobody else."""
    call = paged_step([(1, 18), (6, 3), (1, 4)])
    rows = call["cache"].view(FP32).numel() // 32
    call["read"][3], call["write"][0] = rows, -rows
    before = call["cache"].clone()
    got = run(call)
    assert got[:, :, 0].isnan().all()
    assert got[:, :, 1:].isfinite().all()
    call["write"] = call["write"][1:]
    written = torch.zeros(rows, dtype=torch.bool)
    written[call["write"]] = written[call["write"] + call["first_key"]] = True
    same = call["cache"].view(FP32).view(rows, 32) == before.view(FP32).view(rows, 32)
    assert torch.equal(same.all(1), ~written)


@pytest.mark.slow
def test_one_binary_for_all_steps() -> None:
    """Sizes of a step, places of a layer: neither is compiled for, not even where one is 1."""
    binaries: dict[str, set[int]] = {}

    def compiled(kernel: Any, grid: Any, arguments: Any) -> None:
        options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
        found = kernel.jit.warmup(*arguments, grid=tuple(grid), **options)
        binaries.setdefault(kernel.name, set()).add(id(found))

    with compile_only_gpu():
        for requests in ([(1, 5)], [(1, 15)], [(1, 3), (6, 9)], [(1, 700), (15, 0)]):
            call = paged_step(requests, dtype=BF16)
            for parts in (1, 2):
                how = {"launch": compiled, "arch": ARCHITECTURES["cuda90"], "parts": parts}
                run(call, **how)
                run({**call, "first_key": 1, "first_value": 16}, **how)
    assert {name: len(found) for name, found in binaries.items()} == dict.fromkeys(
        ("write_new", "attend", "attend_split", "attend_sum"), 1
    )


def test_all_that_steps_need_is_compiled_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    launched: list[str] = []

    def launch(kernel: GeneratedKernel, grid: Any, arguments: Any) -> None:
        launched.append(kernel.key)
        launch_interpreted(kernel, grid, arguments)

    monkeypatch.setattr(module, "_COMPILED", set())
    monkeypatch.setattr(module, "_compile", lambda kernel, *_: compiled.append(kernel.key))
    monkeypatch.setattr(module, "launch_wrapped", launch)
    monkeypatch.setattr(module, "architecture", lambda device: ARCHITECTURES["cuda90"])
    module.triton_attention(PagedStep(**paged_step([(1, 3)], dtype=BF16, heads=1)))
    count = len(compiled)
    assert count
    for requests in ([(1, 600)], [(FEW, 2), (1, 5)]):
        call = paged_step(requests, dtype=BF16, heads=1)
        want, got = (by(PagedStep(**call)) for by in (by_request, module.triton_attention))
        assert error(got.double(), want.double()) <= TOLERANCE[BF16]
    assert len(compiled) == count
    assert set(launched) <= set(compiled)
    assert len(set(launched)) == 5  # write_new, attend for few and for many, in parts, their sum
