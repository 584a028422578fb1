"""Attention of one layer over a paged cache on a CPU: request by request, and by a mask over all.

16 requests; 16 heads of 64 numbers, of which each or every fourth has keys of its own; pages of 16
in random order. Cases: a token each at contexts of 64, 500 and 2,000; a prompt of 241 tokens beside
15 such tokens; a chunk of 512 of one prompt. The base is `lorafx::paged_cache` and torch's
attention by the mask over what it returns, as graphs have them without the pass `attend`. On a GPU
`make gpu` measures it in bfloat16, with heads of Llama-3-8B and of a model in which each head has
keys of its own: "own keys" has the tiles and parts that are chosen without naming them, the others
those of their names.

    python benchmarks/paged_attention.py [--quick] [--blocks N] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_protocol
import torch
from gpu_job import Context, Rows
from protocol import rows_of, save
from torch import Tensor

import lorafx.kernels.cpu.attention  # noqa: F401  its kernel
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE, PagedStep
from lorafx.kernels.triton.attention import PagedAttentionSpec, architecture, attend
from lorafx.kernels.triton.generated import launch_interpreted, launch_wrapped

HEADS, SIZE, PAGE, REQUESTS = 16, 64, 16, 16
#: Case -> of each request the new tokens, and all that it has.
CASES: dict[str, list[tuple[int, int]]] = {
    **{f"decode, contexts of {n}": [(1, n)] * REQUESTS for n in (64, 500, 2000)},
    "a prompt of 241 beside contexts of 500": [(241, 241), *[(1, 500)] * (REQUESTS - 1)],
    "512 tokens of a prompt of 2048": [(512, 2048)],
}
#: The same by phase, on a GPU.
GPU_CASES: dict[str, dict[str, list[tuple[int, int]]]] = {
    "decode": {
        "64 requests, contexts of 1000": [(1, 1000)] * 64,
        "8 requests, contexts of 1000": [(1, 1000)] * 8,
        "one request, a context of 8000": [(1, 8000)],
        "16 requests, contexts of 64": [(1, 64)] * 16,
    },
    "chunks": {
        "a prompt of 497 beside contexts of 1000": [(497, 497), *[(1, 1000)] * 15],
        "512 tokens of a prompt of 4096": [(512, 4096)],
        "four prompts of 512": [(512, 512)] * 4,
    },
}
GPU_TINY = {"decode": [(1, 9), (1, 30)], "chunks": [(5, 12), (1, 20)]}
#: Heads of queries, of keys, and numbers a head.
GPU_HEADS = {"grouped": (32, 8, 128), "each its own": (32, 32, 128)}
#: Arm -> arguments of lorafx.kernels.triton.attention.attend.
GPU_ARMS: dict[str, dict[str, Any]] = {
    "own keys": {},
    "tiles of few": {"few": True},
    "tiles of many": {"few": False},
    **{f"{parts} parts": {"parts": parts} for parts in (1, 4, 16)},
}
TINY_ARMS = ("own keys", "4 parts")
#: Largest difference of two results in bfloat16, of order one.
TOLERANCE = 3e-2


def step_of(
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    heads: int = HEADS,
    keys: int = HEADS,
    size: int = SIZE,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What `lorafx::paged_attention` takes for a step of requests of these lengths."""
    torch.manual_seed(0)
    tokens, count = (sum(numbers) for numbers in zip(*lengths, strict=True))
    pages = [-(-have // PAGE) for _, have in lengths]
    order = torch.randperm(sum(pages))
    mask = torch.full((1, 1, tokens, count), torch.finfo(dtype).min, dtype=dtype)
    read, write, seen = [], [], []
    token = begin = page = 0
    for (new, have), own in zip(lengths, pages, strict=True):
        firsts = order[page : page + own, None] * 2 * PAGE
        rows = (firsts + torch.arange(PAGE)).flatten()[:have]
        read.append(rows)
        write.append(rows[-new:])
        seen += [[begin, begin + have]] * new
        block = mask[0, 0, token : token + new, begin : begin + have]
        block.triu_(have - new + 1)
        token, begin, page = token + new, begin + have, page + own
    query, key, value = (
        torch.randn(1, tokens, own, size, device=device).to(dtype).transpose(1, 2)
        for own in (heads, keys, keys)
    )
    cache = torch.randn(2 * PAGE * sum(pages) * keys * size, device=device).to(dtype)
    return {
        "query": query,
        "key": key,
        "value": value,
        "cache": cache.view(torch.uint8),
        "read": torch.cat(read).to(device),
        "write": torch.cat(write).to(device),
        "seen": torch.tensor(seen).to(device),
        "mask": mask.to(device),
        "first_key": 0,
        "first_value": PAGE,
        "sentinel": -1,
        "ring": False,
        "scale": size**-0.5,
    }


def by_mask(call: Mapping[str, Any]) -> Tensor:
    """The base."""
    names = ("key", "value", "cache", "read", "write")
    where = (call[name] for name in ("first_key", "first_value", "sentinel", "ring"))
    found = PAGED_CACHE(*(call[name] for name in names), *where)
    query, group = call["query"], call["query"].shape[1] // call["key"].shape[1]
    k, v = (part.repeat_interleave(group, 1) for part in found)
    return torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=call["mask"])


def own_keys(call: Mapping[str, Any], **how: Any) -> Tensor:
    """`lorafx::paged_attention` as a GPU has it; in Triton's interpreter on a CPU."""
    step = PagedStep(**call)
    spec, device = PagedAttentionSpec.of(step), step.query.device
    assert spec is not None
    launch = launch_wrapped if device.type == "cuda" else launch_interpreted
    return attend(launch, architecture(device), spec, step, **how)


def attend_on_gpu(context: Context, *, phase: str) -> None:
    """Job: one case after the other, every arm a CUDA graph over copies of the cache."""
    lengths = {f"{phase}, tiny": GPU_TINY[phase]} if context.tiny else GPU_CASES[phase]
    cases = {
        f"{name}, keys: {heads}": (f"{name}, keys: {heads}", given, GPU_HEADS[heads])
        for heads in GPU_HEADS
        for name, given in lengths.items()
    }

    def measured(case: tuple[str, Any, tuple[int, int, int]]) -> Rows:
        key, given, sizes = case
        sizes = (4, 2, 16) if context.tiny else sizes
        call = step_of(given, torch.bfloat16, *sizes, context.device)
        return measured_on_gpu(context, key, call)

    def summary(rows: Rows) -> str:
        own = [row for row in rows if row["arm"] == "own keys"]
        return "; ".join(f"{row['case']} {row['median']:.3f}" for row in own)

    context.measure(cases, measured, summary)


def measured_on_gpu(context: Context, key: str, call: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of results of one case.

    Raises:
        RuntimeError: the two differ by more than rounding explains.
    """
    meter, want = gpu_protocol.Meter(context.device), by_mask(call)
    # In an interpreter each part takes its time.
    hows = {name: how for name, how in GPU_ARMS.items() if not context.tiny or name in TINY_ARMS}
    off = {arm: float((own_keys(call, **how) - want).abs().max()) for arm, how in hows.items()}
    if not max(off.values()) < TOLERANCE:
        raise RuntimeError(f"{key}: off by {off}")
    copies = range(meter.copies(call["cache"].nbytes))
    calls = [{**call, "cache": call["cache"].clone()} for _ in copies]
    arms = {
        name: meter.arm([partial(own_keys, own, **how) for own in calls])
        for name, how in hows.items()
    }
    rows = meter.compare(key, meter.arm([partial(by_mask, own) for own in calls]), arms)
    return [row | {"largest difference": off.get(row["arm"])} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few blocks, to see that it runs")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: results/paged_attention.json")
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for keys in (HEADS, HEADS // 4):
            for case, lengths in CASES.items():
                call = step_of(lengths, dtype, keys=keys)
                base, own = partial(by_mask, call), partial(PAGED_ATTENTION, **call)
                torch.testing.assert_close(own(), base(), rtol=0, atol=TOLERANCE)
                blocks = 2 if arguments.quick else arguments.blocks
                name = f"{case}, {keys} heads of keys, {str(dtype).removeprefix('torch.')}"
                rows += rows_of(name, base, {"own keys": own}, blocks=blocks)
    if not arguments.quick or arguments.out:
        out = arguments.out or Path(__file__).parent / "results" / "paged_attention.json"
        save(out, "attention over a paged cache, on a CPU", rows)


if __name__ == "__main__":
    main()
