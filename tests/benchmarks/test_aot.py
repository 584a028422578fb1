"""Generated Triton kernels compiled for chips that are not here: nothing spilled, all fits.

`make test` compiles one shape of each kernel for each target; all variants are slow. The committed
summary of all of them (docs/kernels.md) must be of the sources as they are.
"""

from __future__ import annotations

from pathlib import Path

import aot
import pytest
import torch
from aot import TARGETS, Record, compile_variant
from triton_variants import AotVariant, variants_for_aot

from lorafx.kernels.triton.attention import PagedAttentionSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
#: One variant a kernel, the layer o_proj of Llama-3-8B, whose row tiles are those of many requests;
#: attention of Llama-3-8B's and gpt-oss's heads.
CUT = (
    "split/split/o_r16_bf16/m64",
    "split/reduce/o_r16_bf16/m64",
    "epilogue/shrink/o_r16_bf16/m64",
    "epilogue/epilogue/o_r16_bf16/m64",
    "epilogue/epilogue/o_r16_bf16/m4096",
    "segments/expand/o_r16_bf16/m4096",
    "concat/gather/o_r16_bf16/m4096",
    "concat/place/qkv_r16_bf16/m4096",
    "gemv/shrink_rows/o_r16_bf16/m1",
    "gemv/expand_rows/o_r16_bf16/m1",
    "embedding/embedding_rows/embedding_r16_bf16/m1",
    "order",
    "paged_attention/attend/llama_bf16/many",
    "paged_attention/attend_split/gptoss_bf16/few",
    "paged_attention/attend_sum/llama_bf16",
    "paged_attention/write_new/llama_bf16",
)
HALF = (torch.float16, torch.bfloat16)


def expected_matrix(variant: AotVariant, target: str) -> str | None:
    """The matrix instruction that a kernel with a dot of 16-bit types has to have."""
    spec, tiles = variant.spec, variant.kernel.tiles
    name = variant.kernel.name
    if spec is None or "rows" in name or name in ("order", "gather", "attend_sum", "write_new"):
        return None
    if isinstance(spec, PagedAttentionSpec):
        names = TARGETS[target].matrix if spec.dtype in HALF else [None]
        return names[0] if tiles.block_m >= 64 else names[-1]
    # x Wᵀ is in the others
    without = ("expand", "shrink", "place", "reduce")
    product = variant.kernel.name not in without
    delta = spec.delta
    if product:
        is_half, tall = delta.x_dtype in HALF, tiles.block_n if tiles.swap else tiles.block_m
    elif variant.kernel.name in ("shrink", "place"):
        is_half = delta.x_dtype in HALF and delta.x_dtype == delta.bank_dtype
        tall = tiles.block_r if tiles.swap else tiles.block_m
    else:
        is_half = delta.y_dtype in HALF and delta.y_dtype == delta.bank_dtype
        tall = tiles.block_n if tiles.swap else tiles.block_m
    if not is_half:
        return None
    # A warpgroup's instruction takes 64 rows at a time; narrower tiles use the older one.
    names = TARGETS[target].matrix
    return names[0] if tall >= 64 else names[-1]


def check(record: Record, variant: AotVariant) -> None:
    name = f"{record.variant} for {record.target}"
    assert not record.faults, f"{name}: {'; '.join(record.faults)}"
    assert 0 < record.registers <= TARGETS[record.target].registers, name
    wanted = expected_matrix(variant, record.target)
    if wanted is not None:
        assert record.matrix.get(wanted), f"{name} has no {wanted}: {dict(record.matrix)}"
    assert not record.partitions, f"{name}: warps are specialised, which no template asks for"


@pytest.mark.parametrize(
    "target",
    [t if t == "cuda90" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS],
)
def test_each_kernel_fits_each_chip(target: str) -> None:
    variants = {v.name: v for v in variants_for_aot(target, (1, 64, 4096))}
    assert set(CUT) <= set(variants)
    for name in CUT:
        check(compile_variant(variants[name], target), variants[name])


def test_the_cut_has_every_kernel() -> None:
    """And each variant has a signature that fits its function."""
    variants = list(variants_for_aot("cuda90", (1, 64)))
    kernels = {variant.kernel.name for variant in variants}
    assert {name.split("/")[1] if "/" in name else name for name in CUT} >= kernels
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        assert list(variant.signature) == variant.function.arg_names
        pointers = [name for name, kind in variant.signature.items() if kind.startswith("*")]
        assert all(name.endswith("_ptr") for name in pointers)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_fits(target: str) -> None:
    variants = {variant.name: variant for variant in variants_for_aot(target)}
    for result in aot.records(aot.names_of([target]), jobs=2):
        assert isinstance(result, Record), str(result)
        check(result, variants[result.variant])


def test_the_committed_summary_is_of_these_sources() -> None:
    current = aot.is_current(DOCUMENT.read_text())
    assert current, "run: python benchmarks/aot.py --summary docs/kernels.md"


REGISTER = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2}, %rd1, 1;"
SHARED = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2}, %rd2, %rd1, 1;"


@pytest.mark.parametrize(
    ("text", "unsafe"),
    [
        (f"{REGISTER}\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;", 0),
        (f"{REGISTER}\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;", 1),
        (f"{SHARED}\nwgmma.wait_group.sync.aligned 1;", 0),
        (f"{SHARED}\nwgmma.wait_group.sync.aligned 1;\n{REGISTER}", 1),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};", 0),
    ],
)
def test_register_operands_in_flight_are_found(text: str, unsafe: int) -> None:
    assert aot._in_flight(text) == unsafe


def test_the_command_prints_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--target", "cuda80", "--only", "^order$", "--jobs", "1"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("order cuda80: ")
