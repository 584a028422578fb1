"""`lorafx::paged_attention` is attention by the mask to what `lorafx::paged_cache` returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import error
from toolchain import needs_compiler
from torch import Tensor
from torch.library import opcheck

from lorafx.errors import LoweringError
from lorafx.kernels.cpu import attention as module
from lorafx.kernels.cpu.compiler import runnable_isas
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PagedStep, paged_cache

#: What each token of a step sees of the 31 rows that are read: a request of one token that has 18,
#: one of six with nine, one of a first token, and padding.
SEEN = [(0, 18), *[(18, 27)] * 6, (27, 28), (0, 0)]
COUNT, TOKENS, PAGE, ROWS = 31, len(SEEN), 4, 60
SENTINEL = 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def step(
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    group: int = 1,
    size: int = 10,
    ring: bool = False,
    window: int = 100,
) -> dict[str, Any]:
    """The arguments of a step: pages of four rows, keys behind values."""
    torch.manual_seed(0)
    query = torch.randn(1, heads * group, TOKENS, size).to(dtype)
    key, value = torch.randn(2, 1, heads, TOKENS, size).to(dtype)
    cache = torch.randn(ROWS * heads * size).to(dtype).view(torch.uint8)
    pages = torch.randperm(ROWS // PAGE // 2)[:, None] * PAGE + torch.arange(PAGE)
    read = pages.flatten()[:COUNT] if pages.numel() >= COUNT else pages.flatten().repeat(2)[:COUNT]
    seen = torch.tensor(SEEN)
    mask = torch.full((1, 1, TOKENS, COUNT), torch.finfo(dtype).min, dtype=dtype)
    last = 0
    write = torch.full((TOKENS,), 3)  # where nothing is read
    for token, (begin, end) in enumerate(SEEN):
        if end == begin:
            continue
        after = sum(other == (begin, end) for other in SEEN[token + 1 :])
        last = end - after  # causal
        mask[..., token, max(begin, last - window) : last] = 0
        if ring:
            read[last - 1] = SENTINEL
            write[token] = 20 + token
        else:
            write[token] = 20 + token
            read[last - 1] = write[token]
    tensors = {"query": query, "key": key, "value": value, "cache": cache, "read": read}
    tensors |= {"write": write, "seen": seen, "mask": mask}
    where = {"first_key": 30, "first_value": 0, "sentinel": SENTINEL if ring else -1}
    return {**tensors, **where, "ring": ring, "scale": 0.7 * size**-0.5}


def wanted(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """By the mask over the rows of all, in float64; and the cache afterwards."""
    cache = call["cache"].clone()
    names = ("key", "value", "read", "write", "first_key", "first_value", "sentinel", "ring")
    keys, values = (
        part.double() for part in paged_cache(cache=cache, **{n: call[n] for n in names})
    )
    query, cap, sinks = call["query"].double(), call.get("cap"), call.get("sinks")
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = query @ keys.mT * call["scale"]
    if cap:
        scores = torch.tanh(scores / cap) * cap
    scores = scores + call["mask"].double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(1, -1, TOKENS, 1)], -1)
    out = scores.softmax(-1)[..., :COUNT] @ values
    out[:, :, [begin == end for begin, end in SEEN]] = 0
    return out, cache


def check(call: dict[str, Any]) -> None:
    want, after = wanted(call)
    got = PAGED_ATTENTION(**call)
    assert got.dtype == call["query"].dtype
    assert got.transpose(1, 2).is_contiguous()
    assert error(got.double(), want) <= TOLERANCE[got.dtype]
    assert torch.equal(call["cache"], after)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "of several heads": {"group": 3, "size": 40},
    "a window": {"ring": True, "window": 4},
    "bfloat16": {"dtype": torch.bfloat16, "group": 2, "size": 64},
    "float16": {"dtype": torch.float16, "heads": 3, "size": 17},
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_generated(case: str) -> None:
    call = step(**CASES[case])
    assert module.kernel_of(PagedStep(**call)) is not None
    check(call)


@pytest.mark.parametrize("case", ["plain", "of several heads", "a window", "bfloat16"])
@pytest.mark.parametrize("compiles", [True, False])
def test_caps_and_sinks(case: str, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiles:
        monkeypatch.setattr(module, "kernel_of", lambda *_: None)
    call = step(**CASES[case])
    check({**call, "cap": 0.5, "sinks": torch.randn(call["query"].shape[1])})


@needs_compiler
@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
def test_each_instruction_set(isa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module._built.cache_clear()
    monkeypatch.setattr(module, "best_isa", lambda: isa)
    try:
        check(step(**CASES["of several heads"]))
    finally:
        module._built.cache_clear()


@needs_compiler
def test_any_strides() -> None:
    call = step(group=2)
    for name in ("query", "key", "value"):
        call[name] = call[name].mT.contiguous().mT
    call["mask"] = call["mask"].repeat(1, 1, 1, 2)[..., :COUNT]
    check(call)


@needs_compiler
@pytest.mark.parametrize("part", ["query", "key"])
def test_what_is_no_number_stays_with_its_request(part: str) -> None:
    call = step()
    call[part][:, :, 0] = torch.nan  # of the first request
    got = PAGED_ATTENTION(**call)
    assert got[:, :, 0].isnan().all()
    assert got[:, :, 1:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(("name", "value"), [("read", ROWS), ("write", -1), ("seen", COUNT + 1)])
def test_places_outside_of_the_cache(name: str, value: int) -> None:
    call = step()
    before = call["cache"].clone()
    call[name].view(-1)[5] = value
    with pytest.raises(LoweringError, match=r"outside of a cache of 60 rows or of the 31"):
        PAGED_ATTENTION(**call)
    assert torch.equal(call["cache"], before)


@pytest.mark.parametrize("ring", [True, False])
def test_opcheck(ring: bool) -> None:
    opcheck(PAGED_ATTENTION, tuple(step(ring=ring).values()))


def test_no_tokens() -> None:
    call = step()
    for name, dim in (("query", 2), ("key", 2), ("value", 2), ("mask", 2), ("write", 0)):
        call[name] = call[name].narrow(dim, 0, 0)
    call["seen"] = call["seen"][:0]
    assert PAGED_ATTENTION(**call).shape == (1, 2, 0, 10)
