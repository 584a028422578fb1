"""Kernels to compile ahead of time: strategies by representative specs, as Triton wants them.

    variants_for_aot(architecture) -> AotVariant(name, function, signature, ...), ...

    triton.compile(ASTSource(v.function, v.signature, {}, v.attributes), target,
                   options={"num_warps": v.num_warps, "num_stages": v.num_stages})

Sizes are literals of the sources, so a variant is a shape; those here are the layers of
Llama-3-8B (q/k/v, o, gate/up, down), odd sizes, each dtype, and attention over a paged cache, for
decode and prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.attention import PagedAttentionSpec
from lorafx.kernels.triton.attention import kernel as attention_kernel
from lorafx.kernels.triton.build import (
    CONCAT,
    ORDER_TILES,
    STRATEGY_KERNELS,
    not_concat,
    spec_for,
    tiles_for,
)
from lorafx.kernels.triton.generated import GeneratedKernel, load
from lorafx.kernels.triton.source import Spec, TritonSpec
from lorafx.kernels.triton.tiles import ARCHITECTURES, Architecture

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True, eq=False)
class AotVariant:
    """One kernel for one architecture.

    Attributes:
        name: unique in a run of `variants_for_aot`.
        text: the generated source.
        function: what @triton.jit made of it, for `triton.compiler.ASTSource`.
        signature: Triton's type of each argument.
        attributes: pointers and strides that are multiples of 16, as PyTorch's are.
    """

    name: str
    kernel: GeneratedKernel
    spec: Spec | None
    signature: dict[str, str]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int

    @property
    def function(self) -> Any:
        return self.kernel.jit

    @property
    def text(self) -> str:
        return self.kernel.text


def signature_of(kernel: GeneratedKernel, spec: Spec | None) -> dict[str, str]:
    """Triton's type of each argument of a generated kernel."""
    if isinstance(spec, PagedAttentionSpec):
        return attention_types(kernel, POINTERS[spec.dtype])
    types = {"v_ptr": "*fp32", "p_ptr": "*fp32", "scales_ptr": "*fp32", "ids_ptr": "*i64"}
    if spec is not None:
        d = spec.delta
        types |= {"x_ptr": POINTERS[d.x_dtype], "w_ptr": POINTERS[d.x_dtype]}
        types |= {"a_ptr": POINTERS[d.bank_dtype], "b_ptr": POINTERS[d.bank_dtype]}
        types |= {"bias_ptr": POINTERS[d.x_dtype], "y_ptr": POINTERS[d.y_dtype]}
    default = {True: "*i32", False: "i32"}  # ranks, slots and order; sizes of the batch
    return {name: types.get(name, default[name.endswith("_ptr")]) for name in kernel.jit.arg_names}


def _attributes(signature: dict[str, str], spec: Spec | None) -> dict[Any, Any]:
    """Which arguments are multiples of 16: every pointer, and strides of aligned sizes."""
    aligned = {}
    if isinstance(spec, PagedAttentionSpec):
        aligned = aligned_strides(spec)
    elif spec is not None:
        K, N = spec.delta.in_features, spec.out_features
        strides = {"stride_x": K, "stride_w": N if spec.transposed else K, "stride_y": N}
        strides |= {"slot_a": spec.delta.slot_rows, "token_a": spec.delta.max_rank}
        aligned = {name: stride % 16 == 0 for name, stride in strides.items()}
    return {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if name.endswith("_ptr") or aligned.get(name, False)
    }


def packed_delta(
    K: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype, **changes: Any
) -> DeltaSpec:
    """Of siblings of these sizes that share x, all of one dtype."""
    count = len(sizes)
    arguments: dict[str, Any] = {
        "x_dtype": dtype,
        "bank_dtype": dtype,
        "y_dtype": dtype,
        "in_features": K,
        "max_rank": rank,
        "group": count,
        "columns": sum(sizes),
        "siblings": tuple(range(count)),
        "offsets": tuple(sum(sizes[:j]) for j in range(count)),
        "sizes": sizes,
    }
    return DeltaSpec(**{**arguments, **changes})


def representative_specs() -> dict[str, TritonSpec]:
    """Specs by name: the layers of Llama-3-8B, odd sizes, each dtype, large ranks, an embedding."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    qkv = (4096, 1024, 1024)
    linear = {
        "qkv_r16_bf16": (packed_delta(4096, qkv, 16, bf16), False, False),
        "qkv_r64_fp16_bias": (packed_delta(4096, qkv, 64, fp16), True, False),
        "o_r16_bf16": (packed_delta(4096, (4096,), 16, bf16), False, False),
        "gate_up_r16_bf16": (packed_delta(4096, (14336, 14336), 16, bf16), False, False),
        "down_r256_bf16": (packed_delta(14336, (4096,), 256, bf16), False, False),
        "conv1d_r8_bf16": (packed_delta(768, (2304,), 8, bf16), True, True),
        "odd_r5_bf16": (packed_delta(2049, (77, 130), 5, bf16), True, False),
        "odd_r5_fp32": (packed_delta(2049, (77, 130), 5, fp32), True, False),
        "o_r16_fp32": (packed_delta(1024, (1024,), 16, fp32), False, False),
        "o_r16_bf16_fp32bank": (
            packed_delta(4096, (4096,), 16, bf16, bank_dtype=fp32),
            False,
            False,
        ),
    }
    specs = {
        name: TritonSpec(delta, delta.x_dtype, bias, transposed)
        for name, (delta, bias, transposed) in linear.items()
    }
    table = packed_delta(0, (4096,), 16, bf16, embedding=True)
    return {**specs, "embedding_r16_bf16": TritonSpec(table)}


#: What is no element of the spec's dtype, and no 32-bit integer.
_ATTENTION_TYPES = {
    **dict.fromkeys(("read_ptr", "write_ptr", "seen_ptr"), "*i64"),
    **dict.fromkeys(("stats_ptr", "sums_ptr", "sinks_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
}


def attention_specs() -> dict[str, PagedAttentionSpec]:
    """Specs by name."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "llama_bf16": PagedAttentionSpec(bf16, 8, 4, 128),
        "gemma_bf16": PagedAttentionSpec(bf16, 8, 2, 256, capped=True, ring=True),
        "gptoss_bf16": PagedAttentionSpec(bf16, 8, 8, 64, sinks=True, ring=True),
        "odd_fp16": PagedAttentionSpec(fp16, 4, 7, 80),
        "llama_fp32": PagedAttentionSpec(fp32, 8, 4, 128),
        "gemma_fp32": PagedAttentionSpec(fp32, 8, 2, 256, capped=True, sinks=True, ring=True),
    }


def attention_kernels(
    arch: Architecture,
) -> Iterator[tuple[str, GeneratedKernel, PagedAttentionSpec]]:
    """Each kernel with its name and spec."""
    specs = attention_specs()
    for name, spec in specs.items():
        for own, few in (("attend", True), ("attend_split", True), ("attend", False)):
            steps = "few" if few else "many"
            yield f"{own}/{name}/{steps}", attention_kernel(own, spec, few, arch), spec
    for name in ("llama_bf16", "gemma_fp32"):
        for own in ("attend_sum", "write_new"):
            yield f"{own}/{name}", attention_kernel(own, specs[name], True, arch), specs[name]


def attention_types(kernel: GeneratedKernel, pointer: str) -> dict[str, str]:
    """Triton's type of each argument; `pointer` is that of the spec's dtype."""
    return {
        name: _ATTENTION_TYPES.get(name, pointer if name.endswith("_ptr") else "i32")
        for name in kernel.jit.arg_names
    }


def aligned_strides(spec: PagedAttentionSpec) -> dict[str, bool]:
    """Which strides are multiples of 16."""
    names = ("q_head", "q_token", "k_head", "k_token", "v_head", "v_token")
    return dict.fromkeys(names, spec.size % 16 == 0)


def _strategies(spec: TritonSpec) -> tuple[str, ...]:
    """The strategies that kernels of a representative spec are compiled for."""
    if spec.delta.embedding:
        return ("embedding",)
    left_out = {"embedding"}
    if not_concat(spec.delta, spec.weight_dtype):
        left_out.add(CONCAT)
    return tuple(s for s in STRATEGY_KERNELS if s not in left_out)


def variants_for_aot(
    architecture: str, rows: tuple[int, ...] = (1, 16, 64, 256, 4096)
) -> Iterator[AotVariant]:
    """Each kernel of each strategy, spec and number of rows, for a row of ARCHITECTURES; no device
    of it is needed."""
    arch = ARCHITECTURES[architecture]
    seen: set[str] = set()

    def variant(name: str, kernel: GeneratedKernel, spec: Spec | None) -> AotVariant:
        seen.add(kernel.key)
        signature = signature_of(kernel, spec)
        attributes = _attributes(signature, spec)
        tiles = kernel.tiles
        launch = (tiles.num_warps, tiles.num_stages)
        return AotVariant(name, kernel, spec, signature, attributes, *launch)

    yield variant("order", load("order", None, ORDER_TILES, arch), None)
    for name, full in representative_specs().items():
        for strategy in _strategies(full):
            spec = spec_for(strategy, full)
            # More rows change the parts of K alone in "split", which is planned for few.
            # Longer operands for the vendor's GEMM are planned for many.
            few, many = strategy == "split", strategy == CONCAT
            for M in [M for M in rows if not (few and M > 64) and not (many and M < 256)]:
                for kernel_name, tiles in tiles_for(strategy, spec.delta, M, arch).items():
                    kernel = load(kernel_name, spec, tiles, arch)
                    if kernel.key not in seen:
                        yield variant(f"{strategy}/{kernel_name}/{name}/m{M}", kernel, spec)
    for name, kernel, paged in attention_kernels(arch):
        if kernel.key not in seen:  # those of float32 are the same for few and many
            yield variant(f"paged_attention/{name}", kernel, paged)
