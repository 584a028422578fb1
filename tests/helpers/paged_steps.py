"""Steps of continuous batching as `lorafx::paged_attention` takes them, of any requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: What attention in a dtype may differ by, where results are of order one.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def paged_step(
    requests: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    group: int = 1,
    size: int = 16,
    page: int = 4,
    window: int = 0,
    cap: float = 0.0,
    sinks: bool = False,
    padding: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The arguments of one step.

    Args:
        requests: of each the new tokens, and those that it had before.
        page: rows of a page; pages lie in random order.
        window: keys that a query sees at most, kept in a ring; 0 for all, kept in pages.
        padding: tokens of nobody at the end.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    kept = [window or new + before for new, before in requests]
    pages = [-(-rows // page) for rows in kept]
    order = torch.randperm(sum(pages), generator=generator)
    trash = sum(pages) * page
    sentinel = trash + 1
    tokens, first = sum(new for new, _ in requests) + padding, 0
    read, write, seen, blocks = [], [], [], []
    begin = 0
    for (new, before), rows, own in zip(requests, kept, pages, strict=True):
        places = (order[first : first + own, None] * page + torch.arange(page)).flatten()
        first += own
        cached = min(before, window - 1) if window else before
        positions = torch.arange(before - cached, before + new)
        at = places[positions % rows]
        fresh = positions >= before
        is_written = fresh & (positions >= before + new - rows)
        read.append(torch.where(fresh, sentinel, at) if window else at)
        write.append(torch.where(is_written, at, trash)[fresh])
        end = begin + cached + new
        seen += [[begin, end]] * new
        begin = end
        back = positions[fresh][:, None] - positions
        blocks.append((back >= 0) & (back < window if window else torch.ones_like(back).bool()))
    visible = torch.block_diag(*blocks).bool()
    mask = torch.zeros(tokens, visible.shape[1]).masked_fill_(
        ~torch.nn.functional.pad(visible, (0, 0, 0, padding)), torch.finfo(dtype).min
    )
    found = {
        "query": random(1, tokens, heads * group, size).transpose(1, 2),
        "key": random(1, tokens, heads, size).transpose(1, 2),
        "value": random(1, tokens, heads, size).transpose(1, 2),
        "cache": random((2 * trash + 4) * heads * size).view(torch.uint8),
        "read": torch.cat(read),
        "write": torch.cat([*write, torch.full((padding,), trash)]),
        "seen": torch.tensor([*seen, *[[0, 0]] * padding]),
        "mask": mask.to(dtype)[None, None],
        "first_key": trash + 2,
        "first_value": 0,
        "sentinel": sentinel if window else -1,
        "ring": window > 0,
        "scale": size**-0.5,
        "cap": cap,
        "sinks": random(heads * group) if sinks else None,
    }
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
    }


def kept_rows(call: dict[str, Any]) -> torch.Tensor:
    """The cache's values and keys, (2, rows, G·D), without the row that all tokens write which are
    not kept, in any order on a GPU."""
    _, heads, _, size = call["key"].shape
    return call["cache"].view(call["key"].dtype).view(2, -1, heads * size)[:, :-2]
