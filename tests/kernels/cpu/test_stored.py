"""`lorafx::weight_mm` and its relatives by integers against float64: few rows, and many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from delta_oracle import assert_delta_joins, assert_product, random_problem
from toolchain import needs_compiler
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import delta_kernels, weight_mm
from lorafx.kernels.cpu.compiler import Isa, best_isa, runnable_isas
from lorafx.kernels.cpu.weight_source import WeightSpec
from lorafx.kernels.ops.op_library import flat

lora = torch.ops.lorafx
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in runnable_isas() if weight_mm.GENERATED.generates(isa)]
#: dtypes of x, scale and zero, and the number of groups
FORMS = [
    (torch.float32, torch.float32, None, 1),
    (torch.bfloat16, torch.float32, None, 1),
    (torch.float16, torch.float16, torch.int8, 1),
    (torch.float32, torch.bfloat16, torch.int8, 4),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, 4),
]


def operands(
    rows: int, features: int, columns: int, form=FORMS[0]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(bias, x, weight), the integers somewhere in a larger buffer."""
    dtype, of_scale, of_zero, groups = form
    torch.manual_seed(rows)
    q = torch.randint(-128, 128, (columns + 5, features), dtype=torch.int8)[5:]
    weight = [q, (torch.rand(columns, groups) / 100).to(of_scale)]
    if of_zero is not None:
        weight.append(torch.randint(-9, 9, (columns, groups)).to(of_zero))
    return torch.randn(columns).to(dtype), torch.randn(rows, features).to(dtype), weight


def mm(x: Tensor, weight: list[Tensor], bias: Tensor | None = None, op=lora.weight_mm) -> Tensor:
    return op(x, weight[0], bias, None, *weight[1:])


def spec_of(form) -> WeightSpec:
    _, x, weight = operands(1, 128, 4, form)
    spec = WeightSpec.of(x, *weight)
    assert spec is not None
    return spec


def check(got: Tensor, x: Tensor, weight: list[Tensor], bias: Tensor | None = None) -> None:
    q, scale, *zero = weight
    W = q.double().unflatten(1, (scale.shape[1], -1)) - (zero[0].double()[..., None] if zero else 0)
    assert_product(got, x, (W * scale.double()[..., None]).flatten(1), bias)


@pytest.fixture
def choice(tried_anew: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test, this process has the kernels and the limits of others again."""
    yield
    monkeypatch.undo()
    weight_mm.GENERATED.forget()
    assert all(weight_mm.ready(spec_of(form)) for form in FORMS)


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.usefixtures("choice")
def test_generated_kernels(isa: Isa, form, monkeypatch) -> None:
    """Tiles of every height, columns that fill no group or vector, features that fill no step."""
    spec = spec_of(form)
    assert WeightSpec.of_key(spec.key) == spec
    assert weight_mm.ready(spec)
    for most, rows in ((10**6, (1, 2, 3, 4, 5, 6, 7, 13, 70)), (0, (2, 70))):  # 0: W is widened
        monkeypatch.setattr(weight_mm, "max_rows", lambda spec, most=most: most)
        weight_mm.GENERATED.load(spec, isa)
        for count in rows:
            for features, columns in ((128, 47), (384, 130)) + ((129, 1), (1, 9)) * (form[3] == 1):
                bias, x, weight = operands(count, features, columns, form)
                check(mm(x, weight), x, weight)
                check(mm(x, weight, bias), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_is_the_same_in_every_batch(form) -> None:
    _, x, weight = operands(weight_mm.max_rows(spec_of(form)), 256, 75, form)
    together = mm(x, weight)
    for rows in (2, 3, 5, 6, 7, 11, 32):
        assert torch.equal(mm(x[:rows], weight), together[:rows])
    fixed = partial(lora.weight_mm, fixed=True)
    # By digits a row alone has other bits.
    by_digits = form[0] != torch.float32 and form[2:] == (None, 1) and best_isa().dpbf16
    for op in (fixed,) if by_digits else (fixed, lora.weight_mm):
        assert torch.equal(mm(x, weight, op=op), together)
        assert torch.equal(mm(x[:1], weight, op=op), together[:1])
        assert torch.equal(mm(x[5:6], weight, op=op), together[5:6])


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 64, 65])
@pytest.mark.parametrize("groups", [1, 4, 8])  # of 16 numbers, which a step would cut
def test_at_the_edge_where_the_library_takes_over(rows: int, groups: int) -> None:
    form = torch.float32, torch.float32, torch.int8, groups
    bias, x, weight = operands(rows, 128, 47, form)
    check(mm(x, weight), x, weight)
    check(mm(x, weight, bias), x, weight, bias)


@needs_compiler
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [[0], [-1] * 3, [0, 1, 2, 3, -1] * 14], ids=len)
def test_with_a_delta(slots: list[int], dtype: torch.dtype) -> None:
    """The bits of two ops."""
    settings = {"sizes": (13, 300, 70), "max_rank": 19, "rows": 1, "x_shape": (len(slots), 133)}
    p = random_problem(dtypes=(dtype,) * 3, slots=slots, seed=len(slots), **settings)
    kernel = delta_kernels.build(p.spec)
    form = dtype, torch.float32, None, 1
    bias, _, weight = operands(1, 133, p.y.shape[-1], form)
    assert_delta_joins(p, bias, weight, kernel)


@needs_compiler
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool, with_delta: bool) -> None:
    p = random_problem(
        dtypes=(torch.float32,) * 3, slots=[0, -1, 1], seed=3, sizes=(9,), max_rank=3, rows=1,
        x_shape=(3, 64),
    )  # fmt: skip
    added, _, weight = operands(3, 64, 9, FORMS[3])
    weight = [weight[0], *(t.float() for t in weight[1:])]
    q, *tables = weight
    arguments, others = [p.x, q], [added if bias else None, None, *tables]
    if with_delta:
        # What lies beyond a slot's rank is NaN, which opcheck does not expect of inputs.
        bank = p.bank._replace(A=p.A.nan_to_num(), B=p.B.nan_to_num())
        arguments += [*bank, 1, delta_kernels.build(p.spec)]
    op = lora.weight_mm_delta if with_delta else lora.weight_mm
    found = torch.library.opcheck(op.default, (*arguments, *others))
    assert set(found.values()) == {"SUCCESS"}


def several(rows: int, form, *, biased: bool) -> tuple[list[Any], list[Tensor]]:
    """Arguments of weight_mms_delta for three siblings of one bank, and what single ops compute."""
    settings = {"sizes": (13, 40, 7), "max_rank": 3, "rows": 1, "x_shape": (rows, 128)}
    slots = ([0, -1, 1] * rows)[:rows]
    p = random_problem(dtypes=(form[0],) * 3, slots=slots, seed=3, **settings)
    # What lies beyond a slot's rank is NaN, which opcheck does not expect of inputs.
    bank = p.bank._replace(A=p.A.nan_to_num(), B=p.B.nan_to_num())
    ranges = zip(p.spec.siblings, p.spec.offsets, p.spec.sizes, strict=True)
    specs = [replace(p.spec, siblings=(j,), offsets=(o,), sizes=(n,)) for j, o, n in ranges]
    kernels = [delta_kernels.build(spec) for spec in specs]
    parts = [operands(rows + i, 128, spec.sizes[0], form) for i, spec in enumerate(specs)]
    weights, biases = [part[2] for part in parts], [part[0] for part in parts] if biased else []
    apart = []
    for i, ((q, *tables), kernel) in enumerate(zip(weights, kernels, strict=True)):
        others = biases[i] if biased else None, None, *tables
        apart.append(lora.weight_mm_delta(p.x, q, *bank, 1, kernel, *others))
    return [p.x, [item for weight in weights for item in weight], biases, *bank, 1, kernels], apart


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_siblings_in_one_op(rows: int, form) -> None:
    """The bits of single ops, by the op's own implementation too."""
    for biased in (False, True):
        arguments, apart = several(rows, form, biased=biased)
        for op in (lora.weight_mms_delta, flat(weight_mm.products_and_deltas)):
            assert all(map(torch.equal, op(*arguments), apart))


@needs_compiler
def test_bad_siblings() -> None:
    arguments, _ = several(2, FORMS[0], biased=True)
    lora.weight_mms_delta(*arguments)
    for place, less in ((1, 1), (2, 1), (-1, 3), (-1, 1)):
        wrong = list(arguments)
        wrong[place] = wrong[place][less:]
        with pytest.raises(RuntimeError, match="differ in number"):
            lora.weight_mms_delta(*wrong)
        with pytest.raises(LoweringError, match="differ in number"):
            flat(weight_mm.products_and_deltas)(*wrong)
    arguments[-2] = 0  # one owner for all rows
    with pytest.raises(RuntimeError, match="a mixed batch"):
        lora.weight_mms_delta(*arguments)


@needs_compiler
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_of_siblings(biased: bool) -> None:
    arguments, _ = several(3, FORMS[3], biased=biased)
    found = torch.library.opcheck(lora.weight_mms_delta.default, tuple(arguments))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.usefixtures("refused_sources")
def test_a_refused_source() -> None:
    """The ops' own implementations, which run until a kernel is loaded."""
    given = [operands(3, 128, 9, form) for form in FORMS]
    with pytest.warns(LorafxWarning, match="stay with aten: refused"):
        found = [mm(x, weight, op=weight_mm.product) for _, x, weight in given]
    for y, (bias, x, weight) in zip(found, given, strict=True):
        W = weight_mm.widened(x.dtype, *weight)
        assert torch.allclose(y.float(), (x @ W.T).float())
        check(mm(x, weight, bias, weight_mm.product), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x[:, :-1], w), "do not fit together|127 columns, weight has 128"),
        (lambda x, w: (x, [w[0][0], *w[1:]]), "do not fit together|weight \\(N, K\\)"),
        (lambda x, w: (x, [w[0], w[1][:-1], w[2]]), "scale"),
        (lambda x, w: (x, [w[0], w[1][:, :3].contiguous(), w[2]]), "scale"),
        (lambda x, w: (x, [w[0], w[1], w[2][:, :1].contiguous()]), "zero"),
        (lambda x, w: (x, w[:1]), "differ in dtype"),
        (lambda x, w: (x, [w[0], None, w[2]]), "a zero without a scale"),
    ],
)
def test_bad_operands(change, message) -> None:
    """Refused by the kernel, and by the fake one when a graph is traced."""
    _, x, weight = operands(3, 128, 9, FORMS[3])
    mm(x, weight)
    x, weight = change(x, weight)
    with pytest.raises(RuntimeError, match=message):
        mm(x, weight)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, weight = tree_map_only(Tensor, mode.from_tensor, (x, weight))
        with pytest.raises((LoweringError, RuntimeError), match=message):
            mm(x, weight)
