"""`lorafx::paged_attention` on a GPU, by generated Triton kernels.

    write_new      the keys and values of new tokens go into the cache; of a ring, at the end
    attend         a program for each head of keys and tile of tokens that see the same
    attend_split   the same with a program for each part of the keys, and
    attend_sum     its parts put together, in their order

    tile = BLOCK_M rows of queries (tokens of one request times the heads of a group)
           × BLOCK_N keys of one head

The host knows how many tokens a step has, only the device their requests: the grid has a program
for each token, and all but the first of a tile end at once. Sizes of a step are arguments. So the
host does not wait, and all mixes, lengths and layers use one kernel. Tiles are chosen by the number
of tokens, and keys are cut into parts where programs are fewer than processors. No figure here was
measured on a GPU.

Importing this module registers it for CUDA and ROCm devices, where steps without kernels
(`has_kernels`) are computed as on other devices. A kernel cannot raise: to a row outside of the
cache nothing is written, and a token that sees such a row gets NaN.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.attention import kernel_of
from lorafx.kernels.ops.delta_spec import FLOATS
from lorafx.kernels.ops.op_library import define_on
from lorafx.kernels.ops.paged_attention import AttentionSpec, PagedStep, by_request, check_step
from lorafx.kernels.triton.generated import GeneratedKernel, Launch, launch_wrapped, load
from lorafx.kernels.triton.source import TYPES
from lorafx.kernels.triton.tiles import Architecture, Tiles, architecture_of, power_of_two

#: Most numbers a head: with more, a tile's sums do not fit into registers.
MOST_SIZE = 256
#: Most heads of a group, for the same reason.
MOST_GROUP = 64
#: Tokens of a step up to which tiles are those of decode.
FEW = 128
#: Programs for each processor that keys are cut up for.
WAVES = 2
#: Most parts of the keys, and least keys of a part.
MOST_PARTS, LEAST_KEYS = 16, 256


def has_kernels(step: PagedStep) -> bool:
    """Whether kernels are generated for a step, whose tensors may be fake."""
    query, key = step.query, step.key
    heads, size = key.shape[1], key.shape[3]
    typed = query.dtype in FLOATS and query.dtype == key.dtype and query.dtype == step.mask.dtype
    sized = 0 < size <= MOST_SIZE and 0 < heads <= query.shape[1] <= MOST_GROUP * heads
    return typed and sized


@dataclass(frozen=True)
class PagedAttentionSpec(AttentionSpec):
    """Adds whether heads have a further score (sinks), and whether the cache is a ring."""

    sinks: bool = False
    ring: bool = False

    @classmethod
    def of(cls, step: PagedStep) -> PagedAttentionSpec | None:
        if not has_kernels(step):
            return None
        return cls.of_sizes(step, sinks=step.sinks is not None, ring=step.ring)

    def heading(self) -> list[str]:
        return [str(self)]

    def parameters(self, kernel: str, tiles: Tiles) -> dict[str, Any]:
        D, heads = self.size, self.heads * self.group
        return {
            "dtype": TYPES[self.dtype],
            "sizes_by_name": {
                "D": D,
                "ROW": self.heads * D,
                "GROUP": self.group,
                "HEADS": heads,
                "TOKENS": tiles.block_m // self.group,
                "BLOCK_D": power_of_two(D, 16, MOST_SIZE),
                **tiles.blocks,
            },
            "capped": self.capped,
            "sinks": self.sinks,
            "ring": self.ring,
            "hidden": repr(torch.finfo(self.dtype).min / 2),
        }


def parts_for(programs: int, keys: int, arch: Architecture) -> int:
    """Parts of the keys of a token, at most `keys`, for a grid of `programs` with one part."""
    wanted = -(-WAVES * arch.processors // max(programs, 1))
    return max(min(wanted, keys // LEAST_KEYS, MOST_PARTS), 1)


architecture = functools.cache(architecture_of)


@functools.cache
def kernel(name: str, spec: PagedAttentionSpec, few: bool, arch: Architecture) -> GeneratedKernel:
    return load(name, spec, _tiles(name, spec, few, arch), arch)


def _tiles(name: str, spec: PagedAttentionSpec, few: bool, arch: Architecture) -> Tiles:
    if name == "write_new":
        return Tiles(block_n=power_of_two(spec.heads * spec.size, 16, 1024))
    if name == "attend_sum":
        return Tiles(num_warps=1)
    wide = spec.size > 128
    least = power_of_two(spec.group, 16, MOST_GROUP)
    if arch.name == "interpreter":
        return Tiles(block_m=least, block_n=32)
    if spec.dtype == torch.float32:  # without matrix instructions: registers for both operands
        return Tiles(block_m=least, block_n=16 if wide else 32, num_stages=2)
    stages = 2 if wide or arch.warp == 64 else 3
    if few:
        return Tiles(block_m=least, block_n=16 if wide else 64, num_stages=stages)
    full = spec.size == power_of_two(spec.size, 16, MOST_SIZE)
    warps = 4 if arch.warp == 64 or (full and not wide) else 8
    rows = max(least, 32) if wide else 64
    return Tiles(block_m=rows, block_n=32, num_warps=warps, num_stages=stages)


def triton_attention(step: PagedStep) -> Tensor:
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


#: Kernels of later steps are compiled at the first, so that no step waits for a compiler.
_COMPILED: set[tuple[PagedAttentionSpec, torch.device]] = set()


def _compile(kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
    """A launcher that compiles the kernel instead of running it."""
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
    """`triton_attention` by the kernels of `spec`; `few` and `parts` (of the keys) override the
    choice by numbers of tokens, programs and keys. The reference is `by_request`."""
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
    inputs = [query, rows, rows, *fresh, read, seen, mask]
    sizes = [tokens, count, first_key, first_value, limit, mask.stride(2)]
    tail = [query.stride(1), query.stride(2), *(new if spec.ring else ()), step.scale, step.cap]
    scores = [] if sinks is None else [sinks.float().contiguous()]

    whole = kernel("attend", spec, few, arch)
    tiles = -(-tokens // (whole.tiles.block_m // spec.group))
    parts = parts_for(tiles * heads, count, arch) if parts is None else parts
    if parts == 1:
        launch(whole, (tokens, heads), [*inputs, *scores, out, *sizes, *tail])
    else:
        stats = query.new_empty((parts, tokens, H, 2), dtype=torch.float32)
        sums = query.new_empty((parts, tokens, H, D), dtype=torch.float32)
        split = kernel("attend_split", spec, few, arch)
        launch(split, (tokens, heads, parts), [*inputs, stats, sums, *sizes, parts, *tail])
        adding = kernel("attend_sum", spec, few, arch)
        launch(adding, (tokens, H), [stats, sums, *scores, out, tokens, parts])
    if spec.ring:
        write_new()  # over rows that were just read
    return out.transpose(1, 2)


def is_generated(step: PagedStep) -> bool:
    if step.query.device.type == "cuda":  # which ROCm's devices call themselves too
        return has_kernels(step)
    return kernel_of(step) is not None


define_on("CUDA", "paged_attention", triton_attention)
