"""Generated kernels of routed experts in Triton's interpreter, against float64: products whose rows
are sorted by expert, and their deltas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouped_cases import Experts, assert_right, kernel_of, lora, make_experts, run
from torch.library import opcheck
from triton_cases import BF16, FP16, FP32

from lorafx.errors import LoweringError
from lorafx.kernels.triton.build import tiles_for
from lorafx.kernels.triton.tiles import ARCHITECTURES

#: Rows of each expert, and the slots that rows have in turn.
BATCHES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "decode": ((2, 0, 3, 1, 0, 4), (0, -1, 2, 1)),
    "one token": ((0, 0, 1, 0), (3,)),
    "all on one expert": ((0, 37, 0), (1, 1, -1, 0)),
    "several adapters in a tile": ((16, 9), (0, 1, 2, 3, -1)),
    "base rows only": ((3, 2), (-1,)),
    "one adapter": ((5, 70, 0, 3), (2,)),
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_mixes(batch: str, dtype: torch.dtype) -> None:
    case = make_experts(*BATCHES[batch], dtype=dtype, transposed=dtype == BF16)
    assert_right(case, run(case))


@pytest.mark.parametrize(
    ("K", "sizes", "rank"),
    [(33, (7,), 1), (1, (1, 1), 8), (48, (32, 16), 33), (130, (33, 66, 5), 64)],
)
def test_sizes_and_ranks(K: int, sizes: tuple[int, ...], rank: int) -> None:
    """Unequal ranks below the bank's: full, one, none, all but one."""
    case = make_experts((5, 0, 12, 2), (0, 3, -1, 1), K=K, sizes=sizes, rank=rank, int64=True)
    assert_right(case, run(case))


@pytest.mark.parametrize("arch", ["cuda90", "gfx942"])
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_the_tiles_of_a_gpu(rows: int, arch: str) -> None:
    """Swapped tiles, adapters side by side, lanes and planes: whatever a chip is given."""
    case = make_experts((3, 0, 21, 1), (0, 1, -1, 2, 3), K=64, sizes=(32, 32), rank=16, dtype=BF16)
    tiles = tiles_for("grouped", case.spec.delta, rows, ARCHITECTURES[arch])
    assert_right(case, run(case, tiles=tiles))


def test_one_kernel_for_all_counts() -> None:
    """Nothing of how many rows an expert has, or how many there are, is in a launch."""
    sizes = {"K": 32, "sizes": (16, 16), "rank": 4}
    kernel = kernel_of(make_experts((2, 2, 2, 2), (0, 1), **sizes), rows_hint=2)
    for counts in ((8, 0, 0, 0), (0, 0, 0, 1), (1, 40, 0, 3)):
        case = make_experts(counts, (0, -1, 3), **sizes)
        got = lora.triton_experts(case.x, case.weight, case.offs, *case.bank, 1, kernel)
        assert_right(case, got)


def test_the_reference_is_what_it_replaces() -> None:
    for batch in BATCHES.values():
        case = make_experts(*batch, tail=3)
        got = lora.fused_experts(
            *(case.x, case.weight, case.offs, *case.bank, case.experts, *case.ranges),
            *(1, False),
        )
        assert_right(case, got)


# --- the op ---


def test_opcheck() -> None:
    case = make_experts((2, 0, 3), (0, -1, 1), K=16, sizes=(8,), rank=2)
    case = replace(case, A=case.A.nan_to_num(), B=case.B.nan_to_num())
    arguments = (case.x, case.weight, case.offs, *case.bank, 1, kernel_of(case))
    checks = opcheck(lora.triton_experts, arguments)
    assert set(checks.values()) == {"SUCCESS"}


BAD: dict[str, Callable[[Experts], dict[str, Any]]] = {
    "the weight is": lambda c: {"weight": c.weight[:, 1:]},
    "offs is": lambda c: {"offs": c.offs[1:]},
    "rows of weight have": lambda c: {"weight": c.weight.mT.contiguous().mT},
    "3 experts do not divide": lambda c: {
        name: getattr(c, name)[:8] for name in ("A", "B", "ranks", "scales")
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    case = make_experts((2, 0, 3), (0, -1, 1))
    kernel = kernel_of(case)
    bad = replace(case, **BAD[message](case))
    with pytest.raises(LoweringError, match=message):
        lora.triton_experts(bad.x, bad.weight, bad.offs, *bad.bank, 1, kernel)
