"""Random index programs: chains of operators that move, join and mix the entries of one tensor.

A program is a chain of random operators (views that merge and split sizes, permutations, tiles,
pieces, joins, pads, reductions, products, gathers, expert dispatch) on x of (B, T, K) or (T, B, K).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

K = 4
TABLE = torch.linspace(-2, 2, 64, dtype=torch.float64).sin()
Step = Callable[[Tensor, random.Random], Tensor]


def merge(y: Tensor, r: random.Random) -> Tensor:
    if y.dim() < 2:
        return y
    d = r.randrange(y.dim() - 1)
    return y.flatten(d, d + 1)


def split_constant(y: Tensor, r: random.Random) -> Tensor:
    """Undo an earlier factor of two, from either side."""
    doubled = y.repeat_interleave(2, 0) if r.random() < 0.5 else torch.cat([y, y])
    return (
        doubled.view(2, -1, *y.shape[1:]) if r.random() < 0.5 else doubled.view(-1, 2, *y.shape[1:])
    )


def exchange_sizes(y: Tensor, r: random.Random) -> Tensor:
    """The misleading view: (a, b, ...) read as (b, a, ...)."""
    return y.reshape(y.shape[1], y.shape[0], *y.shape[2:]) if y.dim() > 1 else y


def permute(y: Tensor, r: random.Random) -> Tensor:
    return y.permute(r.sample(range(y.dim()), y.dim()))


def tile(y: Tensor, r: random.Random) -> Tensor:
    d = r.randrange(y.dim())
    return y.repeat(*(2 if i == d else 1 for i in range(y.dim())))


def interleave(y: Tensor, r: random.Random) -> Tensor:
    return y.repeat_interleave(2, r.randrange(y.dim()))


def halve(y: Tensor, r: random.Random) -> Tensor:
    d = r.randrange(y.dim())
    return torch.cat([y, -y], d).chunk(2, d)[r.randrange(2)]


def drop_first(y: Tensor, r: random.Random) -> Tensor:
    return y.narrow(d := r.randrange(y.dim()), 1, y.shape[d] - 1)


def take_one(y: Tensor, r: random.Random) -> Tensor:
    return y.select(r.randrange(y.dim()), 0) if y.dim() > 1 else y


def strided(y: Tensor, r: random.Random) -> Tensor:
    d = r.randrange(y.dim())
    return y.repeat_interleave(2, d)[(slice(None),) * d + (slice(r.randrange(2), None, 2),)]


def join(y: Tensor, r: random.Random) -> Tensor:
    return torch.cat([y, y.flip(r.randrange(y.dim()))], r.randrange(y.dim()))


def join_shared(y: Tensor, r: random.Random) -> Tensor:
    return torch.cat([torch.ones_like(y), y], r.randrange(y.dim()))


def stack(y: Tensor, r: random.Random) -> Tensor:
    return torch.stack([y, 2 * y], r.randrange(y.dim() + 1))


def roll(y: Tensor, r: random.Random) -> Tensor:
    return y.roll(1, r.randrange(y.dim()))


def pad(y: Tensor, r: random.Random) -> Tensor:
    d = r.randrange(y.dim())
    return torch.nn.functional.pad(y, [0, 0] * (y.dim() - 1 - d) + [1, 0])


def reduce(y: Tensor, r: random.Random) -> Tensor:
    return y.sum(r.randrange(y.dim()), keepdim=r.random() < 0.5) if y.dim() > 1 else y


def scan(y: Tensor, r: random.Random) -> Tensor:
    return y.softmax(r.randrange(y.dim())) + y


def outer(y: Tensor, r: random.Random) -> Tensor:
    d = r.randrange(y.dim())
    return y.unsqueeze(d) - y.unsqueeze(d + 1) if y.dim() < 4 else y


def project(y: Tensor, r: random.Random) -> Tensor:
    return y @ torch.ones(y.shape[-1], 3, dtype=y.dtype) if y.dim() > 1 else y


def scores(y: Tensor, r: random.Random) -> Tensor:
    return (y @ y.transpose(-1, -2)).softmax(-1) @ y if y.dim() > 1 else y


def pick_iota(y: Tensor, r: random.Random) -> Tensor:
    """y[i, best[i]] over the first two dimensions."""
    if y.dim() < 2:
        return y
    best = y.flatten(2).sum(2).argmax(1) if y.dim() > 2 else y.argmax(1)
    return y[torch.arange(y.shape[0]), best]


def pick_along(y: Tensor, r: random.Random) -> Tensor:
    d = r.randrange(y.dim())
    return y.gather(d, y.argsort(d))


def write_some(y: Tensor, r: random.Random) -> Tensor:
    out = y.clone()
    out.select(r.randrange(y.dim()), 0).zero_()
    return out


def look_up(y: Tensor, r: random.Random) -> Tensor:
    return TABLE[(y * 7).long().remainder(64)] if y.dim() < 4 else y


def dispatch(y: Tensor, r: random.Random) -> Tensor:
    """Flat rows to experts and back, or not back, by one of the usual roads."""
    if y.dim() < 2:
        return y
    flat, k, road = y.flatten(0, -2), r.choice([1, 2]), r.randrange(5)
    keys = flat.repeat_interleave(k, 0).sum(1) * 5
    p = keys.long().argsort()
    picked = flat[p // k] * 3 + keys[p, None]
    if road == 0:
        return picked
    if road == 1:
        return picked[p.argsort()]
    if road == 2:
        inverse = torch.empty_like(p)
        inverse[p] = torch.arange(p.shape[0])
        return picked[inverse].view(-1, k, flat.shape[1]).sum(1)
    if road == 3:
        return torch.zeros_like(flat).index_add(0, p // k, picked)
    return picked[p]  # not the inverse


STEPS: tuple[Step, ...] = (
    merge, merge, split_constant, exchange_sizes, permute, permute, tile, interleave, halve,
    drop_first, take_one, strided, join, join_shared, stack, roll, pad, reduce, scan, outer,
    project, scores, pick_iota, pick_along, write_some, look_up, dispatch, dispatch,
)  # fmt: skip


def program(seed: int, length: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        r = random.Random(seed)
        y = x
        for _ in range(length):
            y = r.choice(STEPS)(y, r)
            if y.dim() > 4:
                y = y.sum(r.randrange(5))
        return y

    return run
