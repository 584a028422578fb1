"""Generated Triton kernels against float64, interpreted: sizes, ranks, dtypes, tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
from delta_oracle import sharing_room
from slowly import each, few
from triton_cases import BF16, FP16, FP32, LINEARS, STRATEGIES, assert_right, make_case, run

from lorafx.kernels.triton.build import CONCAT, tiles_for
from lorafx.kernels.triton.tiles import ARCHITECTURES

DTYPES = {"fp32": (FP32,) * 3, "bf16": (BF16,) * 3, "fp16": (FP16,) * 3}
# slots and rows a request
BATCHES = {
    "one row": ((1,), 1),
    "decode": ((2, -1, 0, 1, 1, 3, 0, 0), 1),
    "prefill": ((2, -1, 0, 1), 9),
    "one adapter": ((2, 2, 2), 7),
    "base rows only": ((-1,) * 5, 1),
    "all different": (tuple(range(19)), 1),
}
RANKS = (1, 4, 8, 16, 32, 64, 128, 256)


def spread(batch: int, slots: int) -> tuple[int, ...]:
    """`batch` requests over up to `slots` slots in no order; one in five is a base request."""
    return tuple(-1 if i % 5 == 3 else (i * 7 + 3) % slots for i in range(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", few(BATCHES, "decode", "prefill"))
@pytest.mark.parametrize("strategy", LINEARS)
def test_mixes(strategy: str, batch: str, dtype: str) -> None:
    slots, rows = BATCHES[batch]
    K, dtypes = 77, DTYPES[dtype]
    if strategy == CONCAT:  # which takes no other sizes and no float16
        K, dtypes = 80, DTYPES["fp32" if dtype == "fp16" else dtype]
    case = make_case(K=K, sizes=(45, 33), slots=slots, rows=rows, rank=5, dtypes=dtypes)
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize(
    ("slices", "rank"),
    each(3, [(1 + (turn + more) % 3, r) for turn, r in enumerate(RANKS) for more in (0, 1)]),
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_and_slices(strategy: str, slices: int, rank: int) -> None:
    """Small odd sizes, each rank with two of three numbers of slices; dtypes take turns."""
    dtypes = list(DTYPES.values())[(rank.bit_length() + slices) % 3]
    batch = 4 if strategy == "gemv" else 16  # a program a row is slow in the interpreter
    sizes, slots = (51, 64, 17)[:slices], spread(batch, 8)
    case = make_case(K=129, sizes=sizes, slots=slots, rank=rank, capacity=8, dtypes=dtypes)
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize("strategy", LINEARS)
def test_slots_that_share_room(strategy: str) -> None:
    case = make_case(K=48, sizes=(48, 7), slots=(2, -1, 0, 1), rows=2, rank=5)
    shared = replace(case, problem=sharing_room(case.problem, 2))
    assert shared.spec.delta.spacing == 2
    assert_right(shared, strategy, run(shared, strategy))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("strategy", ["split", "epilogue", CONCAT])
def test_base_layouts(strategy: str, transposed: bool, bias: bool) -> None:
    base = {"bias": bias, "transposed": transposed}
    case = make_case(K=80, sizes=(33, 20), slots=(1, 0, -1), rows=2, **base)
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize("siblings", [(2, 0), (1, 2)])
@pytest.mark.parametrize("strategy", LINEARS)
def test_some_of_a_group(strategy: str, siblings: tuple[int, ...]) -> None:
    sizes, slots = (40, 9, 31), (1, 0, -1, 2)
    case = make_case(
        K=64, sizes=sizes, slots=slots, rank=6, siblings=siblings, dtypes=DTYPES["bf16"]
    )
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize(
    ("rows", "K"),
    [(17, 520), (18, 512), *(pytest.param(n, 520, marks=pytest.mark.slow) for n in (1, 100))],
)
@pytest.mark.parametrize("strategy", each(2, STRATEGIES))
def test_tiles_of_devices(strategy: str, rows: int, K: int) -> None:
    """The heuristic's tiles for GPUs: transposed tiles, parts of K, lanes, sorted rows. What
    several GPUs have alike runs once."""
    if strategy == "gemv" and rows == 100:
        rows = 23  # a program a row is slow in the interpreter
    dtypes = DTYPES["bf16"] if rows < 20 else DTYPES["fp32"]
    sizes = (72, 24) if K % 16 else (64, 32)  # whole blocks of 16 have tiles of their own
    slots = (3, -1, 0, 3)[: min(rows, 4)]
    case = make_case(K=K, sizes=sizes, slots=slots, rows=-(-rows // 4), M=rows, dtypes=dtypes)
    ran: list[object] = []
    for arch in (arch for name, arch in ARCHITECTURES.items() if name != "interpreter"):
        tiles = tiles_for(strategy, case.spec.delta, rows, arch)
        if tiles not in ran:
            assert_right(case, strategy, run(case, strategy, tiles))
            ran.append(tiles)
