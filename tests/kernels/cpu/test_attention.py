"""`lorafx::paged_attention` is attention by the mask to what `lorafx::paged_cache` returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import error
from paged_steps import TOLERANCE, paged_step
from toolchain import needs_compiler
from torch import Tensor
from torch.library import opcheck

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import attention as module
from lorafx.kernels.cpu import kernels
from lorafx.kernels.cpu.compiler import runnable_isas
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PagedStep, paged_cache

#: A token of a request that has 17, six of one with three, a first token.
REQUESTS = [(1, 17), (6, 3), (1, 0)]


def step(**changes: Any) -> dict[str, Any]:
    return paged_step(REQUESTS, **{"size": 10, "padding": 1, **changes})


def case_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**step(**CASES[name], **changes), "fixed": "fixed" in name}


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
        beside = sinks.double()[:, None, None].expand(1, -1, query.shape[2], 1)
        scores = torch.cat([scores, beside], -1)
    out = scores.softmax(-1)[..., : keys.shape[2]] @ values
    out[:, :, call["seen"][:, 0] == call["seen"][:, 1]] = 0
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
    "a window": {"window": 4},
    "bfloat16": {"dtype": torch.bfloat16, "group": 2, "size": 64},
    "float16": {"dtype": torch.float16, "heads": 3, "size": 17},
    "fixed": {"group": 2, "size": 17},
    "a fixed window": {"window": 4, "dtype": torch.bfloat16},
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_generated(case: str) -> None:
    call = case_of(case)
    assert module.kernel_of(PagedStep(**call)) is not None
    check(call)


@pytest.mark.parametrize(
    "case", ["plain", "of several heads", "a window", "bfloat16", "a fixed window"]
)
@pytest.mark.parametrize("compiles", [True, False])
def test_caps_and_sinks(case: str, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiles:
        monkeypatch.setattr(module, "kernel_of", lambda *_: None)
    call = case_of(case, cap=0.5, sinks=True)
    if call["fixed"] and not compiles:
        with pytest.raises(LoweringError, match="no generated kernel"):
            PAGED_ATTENTION(**call)
    else:
        check(call)


@pytest.mark.usefixtures("refused_sources")
def test_a_refused_source() -> None:
    with pytest.warns(LorafxWarning, match="stays with aten: refused"):
        check(step(**CASES["of several heads"]))


@needs_compiler
@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
@pytest.mark.usefixtures("tried_anew")
def test_each_instruction_set(isa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "best_isa", lambda: isa)
    check(step(**CASES["of several heads"]))


@needs_compiler
@pytest.mark.parametrize("part", ["query", "key"])
def test_what_is_no_number_stays_with_its_request(part: str) -> None:
    call = step()
    call[part][:, :, 0] = torch.nan  # of the first request
    got = PAGED_ATTENTION(**call)
    assert got[:, :, 0].isnan().all()
    assert got[:, :, 1:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(("name", "value"), [("read", 76), ("write", -1), ("seen", 29)])
def test_places_outside_of_the_cache(name: str, value: int) -> None:
    call = step()
    before = call["cache"].clone()
    call[name].view(-1)[5] = value
    with pytest.raises(LoweringError, match=r"outside of a cache of 76 rows or of the 28"):
        PAGED_ATTENTION(**call)
    assert torch.equal(call["cache"], before)


@pytest.mark.parametrize("window", [4, 0])
def test_opcheck(window: int) -> None:
    opcheck(PAGED_ATTENTION, tuple(step(window=window).values()))
