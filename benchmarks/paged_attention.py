"""Attention of one layer over a paged cache on a CPU: request by request, and by a mask over all.

16 requests; 16 heads of 64 numbers, of which each or every fourth has keys of its own; pages of 16
in random order. Cases: a token each at contexts of 64, 500 and 2,000; a prompt of 241 tokens beside
15 such tokens; a chunk of 512 of one prompt. The base is `lorafx::paged_cache` and torch's
attention by the mask over what it returns, as graphs have them without the pass `attend`. On a GPU
it is gpu_attention.py, a job of the GPU queue.

    python benchmarks/paged_attention.py [--quick] [--blocks N] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from protocol import as_row, compare, save
from torch import Tensor

import lorafx.kernels.cpu.attention  # noqa: F401  its kernel
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE

HEADS, SIZE, PAGE, REQUESTS = 16, 64, 16, 16
#: Case -> of each request the new tokens, and all that it has.
CASES: dict[str, list[tuple[int, int]]] = {
    **{f"decode, contexts of {n}": [(1, n)] * REQUESTS for n in (64, 500, 2000)},
    "a prompt of 241 beside contexts of 500": [(241, 241), *[(1, 500)] * (REQUESTS - 1)],
    "512 tokens of a prompt of 2048": [(512, 2048)],
}


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


def arms(
    lengths: Sequence[tuple[int, int]], keys: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The base and the operator, of `keys` heads of keys."""
    call = step_of(lengths, dtype, keys=keys)
    return lambda: by_mask(call), lambda: PAGED_ATTENTION(**call)


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
                base, own_keys = arms(lengths, keys, dtype)
                torch.testing.assert_close(own_keys(), base(), rtol=0, atol=3e-2)
                blocks = 2 if arguments.quick else arguments.blocks
                found = compare(base, {"own keys": own_keys}, blocks=blocks)
                name = f"{case}, {keys} heads of keys, {str(dtype).removeprefix('torch.')}"
                rows += [as_row(name, ratio) for ratio in found]
                for row in rows[-len(found) :]:
                    print(row)
    if not arguments.quick or arguments.out:
        out = arguments.out or Path(__file__).parent / "results" / "paged_attention.json"
        save(out, "attention over a paged cache, on a CPU", rows)


if __name__ == "__main__":
    main()
