"""`lorafx::weight_mm` and its relatives with integers of four bits, in the layout of torch's
operator, against float64 of the weight by which that operator multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from delta_oracle import assert_delta_joins, assert_product, random_problem
from toolchain import needs_compiler
from torch import Tensor

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import delta_kernels, weight_mm
from lorafx.kernels.cpu.compiler import Isa, best_isa, runnable_isas
from lorafx.kernels.cpu.weight_source import WeightSpec, packed_block

lora, aten = torch.ops.lorafx, torch.ops.aten
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in runnable_isas() if weight_mm.GENERATED.generates(isa)]

pytestmark = [needs_compiler, pytest.mark.skipif(not packed_block(), reason="no blocks")]


def operands(
    rows: int, features: int, columns: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(bias, x, weight)"""
    torch.manual_seed(rows)
    q = torch.randint(16, (columns, features), dtype=torch.int32)
    factors = torch.randn(features // group, columns, 2).to(dtype)
    weight = [aten._convert_weight_to_int4pack_for_cpu(q, 1), factors]
    return torch.randn(columns).to(dtype), torch.randn(rows, features).to(dtype), weight


def by_torch(x: Tensor, weight: list[Tensor]) -> Tensor:
    packed, factors = weight
    group = x.shape[1] // factors.shape[0]
    return aten._weight_int4pack_mm_for_cpu(x, packed, group, factors)


def check(got: Tensor, x: Tensor, weight: list[Tensor], bias: Tensor | None = None) -> None:
    W = by_torch(torch.eye(x.shape[1]), [weight[0], weight[1].float()]).T
    assert_product(got, x, W.double(), bias)


def mm(x: Tensor, weight: list[Tensor], bias: Tensor | None = None, op=lora.weight_mm) -> Tensor:
    return op(x, weight[0], bias, None, *weight[1:])


def spec_of(dtype: torch.dtype) -> WeightSpec:
    _, x, weight = operands(1, 32, 16, 32, dtype)
    spec = WeightSpec.of(x, *weight)
    assert spec is not None
    return spec


@pytest.fixture
def choice(tried_anew: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test, this process has the kernels and the limits of others again."""
    yield
    monkeypatch.undo()
    weight_mm.GENERATED.forget()
    assert all(weight_mm.ready(spec_of(dtype)) for dtype in DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.usefixtures("choice")
def test_generated_kernels(isa: Isa, dtype: torch.dtype, monkeypatch) -> None:
    """Tiles of every height, groups of all sizes, last blocks of every size."""
    spec = spec_of(dtype)
    assert WeightSpec.of_key(spec.key) == spec
    assert weight_mm.ready(spec)
    for most, rows in ((10**6, (1, 2, 3, 4, 5, 6, 7, 8, 13, 70)), (0, (2, 70))):  # 0: W is widened
        monkeypatch.setattr(weight_mm, "max_rows", lambda spec, most=most: most)
        weight_mm.GENERATED.load(spec, isa)
        for features, columns, group in (
            (32, 64, 32),
            (192, 16, 64),
            (256, 352, 128),
            (64, 112, 32),
        ):
            for count in rows:
                bias, x, weight = operands(count, features, columns, group, dtype)
                check(mm(x, weight), x, weight)
                check(mm(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    _, x, weight = operands(weight_mm.max_rows(spec_of(dtype)), 256, 80, 64, dtype)
    together = mm(x, weight)
    for rows in (2, 3, 5, 6, 7, 8, 11, 32):
        assert torch.equal(mm(x[:rows], weight), together[:rows])
    fixed = partial(lora.weight_mm, weight=weight[0], scale=weight[1], fixed=True)
    assert torch.equal(fixed(x), together)
    # By digits a row alone has other bits.
    by_digits = dtype != torch.float32 and best_isa().dpbf16
    for alone in (fixed,) if by_digits else (fixed, partial(mm, weight=weight)):
        assert torch.equal(alone(x[:1]), together[:1])
        assert torch.equal(alone(x[5:6]), together[5:6])


@pytest.mark.parametrize("rows", [0, 1, 64, 65])
def test_at_the_edge_where_the_library_takes_over(rows: int) -> None:
    bias, x, weight = operands(rows, 128, 48, 32, torch.float32)
    check(mm(x, weight), x, weight)
    check(mm(x, weight, bias), x, weight, bias)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [[0], [-1] * 3, [0, 1, 2, 3, -1] * 14], ids=len)
def test_with_a_delta(slots: list[int], dtype: torch.dtype) -> None:
    """The bits of two ops."""
    settings = {"sizes": (16, 304, 80), "max_rank": 19, "rows": 1, "x_shape": (len(slots), 128)}
    p = random_problem(dtypes=(dtype,) * 3, slots=slots, seed=len(slots), **settings)
    kernel = delta_kernels.build(p.spec)
    bias, _, weight = operands(1, 128, p.y.shape[-1], 64, dtype)
    assert_delta_joins(p, bias, weight, kernel)


def test_opcheck() -> None:
    bias, x, weight = operands(3, 64, 16, 32, torch.float32)
    for added in (None, bias):
        found = torch.library.opcheck(
            lora.weight_mm.default, (x, weight[0], added, None, weight[1])
        )
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.usefixtures("refused_sources")
def test_a_refused_source() -> None:
    """torch's operator is called then."""
    bias, x, weight = operands(3, 128, 16, 32, torch.bfloat16)
    with pytest.warns(LorafxWarning, match="stay with aten: refused"):
        y = mm(x, weight, op=weight_mm.product)
    assert torch.equal(y, by_torch(x, weight))
    assert torch.equal(mm(x, weight, bias, weight_mm.product), y + bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x[:, :-32], w), "do not fit together|96 columns, weight has 128"),
        (lambda x, w: (x, [w[0], w[1][:3].contiguous()]), "scale"),
        (lambda x, w: (x, [w[0], w[1][:, :8].contiguous()]), "scale"),
        (lambda x, w: (x, [w[0][:8], w[1][:, :8].contiguous()]), "scale"),  # rows are not 16s
        (lambda x, w: (x, [w[0], w[1].repeat(2, 1, 1)]), "scale"),  # groups of 16
        (lambda x, w: (x, [w[0], w[1], w[1]]), "scale"),
    ],
)
def test_bad_operands(change, message) -> None:
    """Refused by the kernel, and by the fake one when a graph is traced."""
    _, x, weight = operands(3, 128, 16, 32, torch.float32)
    mm(x, weight)
    x, weight = change(x, weight)
    with pytest.raises(RuntimeError, match=message):
        mm(x, weight)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, weight = mode.from_tensor(x), [mode.from_tensor(item) for item in weight]
        with pytest.raises((LoweringError, RuntimeError), match=message):
            mm(x, weight)
