"""Attention of one layer over a paged cache on a GPU: request by request, and by a mask over all.

attend(context, phase=...)    a job of the queue: cases of decode, or of chunks of prompts

The base is what graphs have without the pass `attend`: `lorafx::paged_cache`, which copies keys
and values of all requests out of the cache, and torch's attention by the mask over them. Heads are
those of Llama-3-8B and of a model in which each head has keys of its own; pages of 16 rows in
random order; bfloat16. Every arm is a CUDA graph over copies of the cache. "own keys" has the
tiles and parts that are chosen without naming them, the others those of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_protocol
import protocol
import torch
from gpu_job import Context
from paged_attention import by_mask, step_of
from torch import Tensor

from lorafx.kernels.ops.paged_attention import PagedStep
from lorafx.kernels.triton.attention import PagedAttentionSpec, architecture
from lorafx.kernels.triton.attention import attend as attend_to_pages
from lorafx.kernels.triton.generated import launch_interpreted, launch_wrapped

#: By phase, the new tokens of each request and all that it has.
CASES: dict[str, dict[str, list[tuple[int, int]]]] = {
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
TINY = {"decode": [(1, 9), (1, 30)], "chunks": [(5, 12), (1, 20)]}
#: Heads of queries, of keys, and numbers a head.
HEADS = {"grouped": (32, 8, 128), "each its own": (32, 32, 128)}
#: Largest difference of two results in bfloat16, of order one.
TOLERANCE = 3e-2


#: Arm -> arguments of lorafx.kernels.triton.attention.attend.
ARMS: dict[str, dict[str, Any]] = {
    "own keys": {},
    "tiles of few": {"few": True},
    "tiles of many": {"few": False},
    **{f"{parts} parts": {"parts": parts} for parts in (1, 4, 16)},
}
#: In an interpreter, where each part takes its time.
TINY_ARMS = ("own keys", "4 parts")


def own_keys(call: dict[str, Any], how: dict[str, Any]) -> Tensor:
    """`lorafx::paged_attention` as a GPU has it; in Triton's interpreter on a CPU."""
    step = PagedStep(**call)
    spec = PagedAttentionSpec.of(step)
    assert spec is not None
    device = step.query.device
    launch = launch_wrapped if device.type == "cuda" else launch_interpreted
    return attend_to_pages(launch, architecture(device), spec, step, **how)


def attend(context: Context, *, phase: str) -> None:
    """Job: one case after the other."""
    meter = gpu_protocol.Meter(context.device)
    tiny = {f"{phase}, tiny": TINY[phase]}
    cases = {
        f"{name}, keys: {heads}": (lengths, heads)
        for heads in HEADS
        for name, lengths in (tiny if context.tiny else CASES[phase]).items()
    }
    for key in context.order(list(cases)):
        with context.case(key):
            context.add(key, measure(context, meter, key, *cases[key]))
    done = [row for row in context.part.rows if row["arm"] == "own keys"]
    context.summarise("; ".join(f"{row['case']} {row['median']:.3f}" for row in done))


def measure(
    context: Context,
    meter: gpu_protocol.Meter,
    key: str,
    lengths: list[tuple[int, int]],
    heads: str,
) -> list[dict[str, Any]]:
    """Rows of results of one case.

    Raises:
        RuntimeError: the two differ by more than rounding explains.
    """
    query, keys, size = (4, 2, 16) if context.tiny else HEADS[heads]
    dtype, device = torch.bfloat16, context.device
    call = step_of(lengths, dtype, query, keys, size, device)
    want = by_mask(call)
    hows = {name: how for name, how in ARMS.items() if not context.tiny or name in TINY_ARMS}
    off = {arm: float((own_keys(call, how) - want).abs().max()) for arm, how in hows.items()}
    if not max(off.values()) < TOLERANCE:
        raise RuntimeError(f"{key}: off by {off}")
    calls = [
        {**call, "cache": call["cache"].clone()} for _ in range(meter.copies(call["cache"].nbytes))
    ]

    def arm(function: Callable[[dict[str, Any]], Tensor]) -> Any:
        return meter.arm([lambda own=own: function(own) for own in calls])  # type: ignore[misc]

    start = gpu_protocol.clocks()
    rows = []
    arms = {name: arm(lambda own, how=how: own_keys(own, how)) for name, how in hows.items()}  # type: ignore[misc]
    for ratio in meter.compare(arm(by_mask), arms):
        print(f"  {key} {ratio.arm:14s} {ratio}", flush=True)
        row = protocol.as_row(key, ratio) | {"largest difference": off.get(ratio.arm)}
        rows.append(row | {"clocks before": start, "clocks after": gpu_protocol.clocks()})
    return rows
