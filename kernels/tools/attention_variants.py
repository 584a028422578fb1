"""Kernels for attention over a paged cache to compile ahead of time.

Heads of Llama-3-8B, Gemma 2 and gpt-oss, of a size and groups that are no powers of two, and of
float32; for steps of few tokens and of many.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorafx.kernels.triton.attention_spec import PagedAttentionSpec
from lorafx.kernels.triton.triton_attention import kernel
from lorafx.kernels.triton.triton_cache import GeneratedKernel
from lorafx.kernels.triton.triton_tiles import Architecture

#: What is no element of the spec's dtype, and no 32-bit integer.
_TYPES = {
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
            yield f"{own}/{name}/{steps}", kernel(own, spec, few, arch), spec
    for name in ("llama_bf16", "gemma_fp32"):
        for own in ("attend_sum", "write_new"):
            yield f"{own}/{name}", kernel(own, specs[name], True, arch), specs[name]


def attention_types(kernel: GeneratedKernel, pointer: str) -> dict[str, str]:
    """Triton's type of each argument; `pointer` is that of the spec's dtype."""
    return {
        name: _TYPES.get(name, pointer if name.endswith("_ptr") else "i32")
        for name in kernel.jit.arg_names
    }


def aligned_strides(spec: PagedAttentionSpec) -> dict[str, bool]:
    """Which strides are multiples of 16."""
    names = ("q_head", "q_token", "k_head", "k_token", "v_head", "v_token")
    return dict.fromkeys(names, spec.size % 16 == 0)
