"""`lorafx::paged_attention` on a GPU, by generated Triton kernels.

    write_new      the keys and values of new tokens go into the cache; of a ring, at the end
    attend         a program for each head of keys and tile of tokens that see the same
    attend_split   the same with a program for each part of the keys, and
    attend_sum     its parts put together, in their order

What a token sees stays on the device: the grid has a program for each token, and all but the first
of a tile end at once. Sizes of a step are arguments. So nothing waits for the device, and other
mixes, lengths and layers need no other kernel. All that steps may need is compiled at the first.

Importing this module registers it for CUDA and ROCm devices. What has no kernels
(`PagedAttentionSpec.of`) is computed there as on other devices. A kernel cannot raise: to a row
outside of the cache nothing is written, and a token that sees one gets what is no number.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.attention import kernel_of
from lorafx.kernels.ops.op_library import define_on
from lorafx.kernels.ops.paged_attention import PagedStep, by_request, check_step
from lorafx.kernels.triton.attention_spec import (
    FEW,
    PagedAttentionSpec,
    attention_tiles,
    has_kernels,
    parts_for,
)
from lorafx.kernels.triton.launchers import Launch, launch_wrapped
from lorafx.kernels.triton.triton_cache import GeneratedKernel, load
from lorafx.kernels.triton.triton_tiles import Architecture, Tiles, architecture_of, power_of_two

architecture = functools.cache(architecture_of)


@functools.cache
def kernel(name: str, spec: PagedAttentionSpec, few: bool, arch: Architecture) -> GeneratedKernel:
    """The kernel `name` for a step of few tokens, or of many.

    Raises:
        LoweringError: its file cannot be written or imported.
    """
    return load(name, spec, _tiles(name, spec, few, arch), arch)


def _tiles(name: str, spec: PagedAttentionSpec, few: bool, arch: Architecture) -> Tiles:
    if name == "write_new":
        return Tiles(block_n=power_of_two(spec.heads * spec.size, 16, 1024))
    if name == "attend_sum":
        return Tiles(num_warps=1)
    return attention_tiles(spec, few, arch)


def triton_attention(step: PagedStep) -> Tensor:
    """`lorafx.kernels.ops.paged_attention.paged_attention`, with what it raises, on a GPU."""
    check_step(step)
    spec = PagedAttentionSpec.of(step)
    if spec is None:
        return by_request(step)
    with torch.cuda.device_of(step.query):  # where Triton launches
        arch = architecture(step.query.device)
        if (spec, step.query.device) not in _COMPILED:
            for few, parts in itertools.product((True, False), (1, 2)):
                attend(_compile, arch, spec, step, few=few, parts=parts)
            _COMPILED.add((spec, step.query.device))
        return attend(launch_wrapped, arch, spec, step)


#: What later steps may need is there, so that none of them waits for a compiler.
_COMPILED: set[tuple[PagedAttentionSpec, torch.device]] = set()


def _compile(kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
    """In place of a launch: what that would have Triton compile, which keeps it."""
    options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
    kernel.jit.warmup(*arguments, grid=tuple(grid), **options)


def attend(
    launch: Launch,
    arch: Architecture,
    spec: PagedAttentionSpec,
    step: PagedStep,
    *,
    few: bool | None = None,
    parts: int | None = None,
) -> Tensor:
    """`triton_attention` by the kernels of `spec`; its reference is
    `lorafx.kernels.ops.paged_attention.by_request`.

    Args:
        few: whether tiles are those of steps of few tokens; None: by the number of tokens.
        parts: of the keys of a token; None: by the numbers of programs and keys.
    """
    query, key, value, mask = (
        part if part.stride(3) == 1 else part.contiguous()
        for part in (step.query, step.key, step.value, step.mask)
    )
    read, write, seen = (part.contiguous() for part in (step.read, step.write, step.seen))
    first_key, first_value, sinks = step.first_key, step.first_value, step.sinks
    heads, (_, H, tokens, D), count = spec.heads, query.shape, read.shape[0]
    few = tokens <= FEW if few is None else few
    out = step.empty_result()
    rows = step.cache.view(spec.dtype)
    limit = rows.numel() // (heads * D) - max(first_key, first_value)
    new = (*key.stride()[1:3], *value.stride()[1:3])

    def write_new() -> None:
        writing = kernel("write_new", spec, few, arch)
        grid = tokens, -(-heads * D // writing.tiles.block_n)
        where = first_key, first_value, limit
        launch(writing, grid, (key, value, rows, rows, write, *where, *new))

    if not spec.ring:
        write_new()
    fresh: list[Tensor] = []
    if spec.ring:
        is_new = read == step.sentinel
        read, fresh = torch.where(is_new, -is_new.cumsum(0), read), [key, value]
    given = [query, rows, rows, *fresh, read, seen, mask]
    sizes = [tokens, count, first_key, first_value, limit, mask.stride(2)]
    tail = [query.stride(1), query.stride(2), *(new if spec.ring else ()), step.scale, step.cap]
    own = [] if sinks is None else [sinks.float().contiguous()]

    whole = kernel("attend", spec, few, arch)
    tiles = -(-tokens // (whole.tiles.block_m // spec.group))
    parts = parts_for(tiles * heads, count, arch) if parts is None else parts
    if parts == 1:
        launch(whole, (tokens, heads), [*given, *own, out, *sizes, *tail])
    else:
        stats = query.new_empty((parts, tokens, H, 2), dtype=torch.float32)
        sums = query.new_empty((parts, tokens, H, D), dtype=torch.float32)
        split = kernel("attend_split", spec, few, arch)
        launch(split, (tokens, heads, parts), [*given, stats, sums, *sizes, parts, *tail])
        adding = kernel("attend_sum", spec, few, arch)
        launch(adding, (tokens, H), [stats, sums, *own, out, tokens, parts])
    if spec.ring:
        write_new()  # over rows that were just read
    return out.transpose(1, 2)


def is_generated(step: PagedStep) -> bool:
    """Whether a generated kernel computes a step on its device; its tensors may be fake."""
    if step.query.device.type == "cuda":  # which ROCm's devices call themselves too
        return has_kernels(step)
    return kernel_of(step) is not None


define_on("CUDA", "paged_attention", triton_attention)
