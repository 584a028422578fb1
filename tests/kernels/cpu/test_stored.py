"""`lorafx::stored_mm` and its relatives against float64, for few rows and for many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from delta_oracle import assert_delta_joins, assert_product, random_problem
from toolchain import needs_compiler
from torch import Tensor

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import delta_kernels, dense, stored
from lorafx.kernels.cpu.compiler import Isa, runnable_isas
from lorafx.kernels.cpu.stored import StoredSpec

lora = torch.ops.lorafx
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in runnable_isas() if dense.GENERATED.generates(isa)]
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


def spec_of(form) -> StoredSpec:
    spec = StoredSpec.of(*operands(1, 128, 4, form)[1:])
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
    stored.GENERATED.forget()
    assert all(stored.ready(spec_of(form)) for form in FORMS)


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.usefixtures("choice")
def test_generated_kernels(isa: Isa, form, monkeypatch) -> None:
    """Tiles of every height, columns that fill no group or vector, features that fill no step."""
    spec = spec_of(form)
    assert StoredSpec.of_key(spec.key) == spec
    assert stored.ready(spec)
    for most, rows in ((10**6, (1, 2, 3, 4, 5, 6, 7, 13, 70)), (0, (2, 70))):  # 0: W is widened
        monkeypatch.setattr(dense, "max_rows", lambda dtype, most=most: most)
        stored.GENERATED.load(spec, isa)
        for count in rows:
            for features, columns in ((128, 47), (384, 130)) + ((129, 1), (1, 9)) * (form[3] == 1):
                bias, x, weight = operands(count, features, columns, form)
                check(lora.stored_mm(x, weight), x, weight)
                check(lora.stored_addmm(bias, x, weight), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_is_the_same_in_every_batch(form) -> None:
    _, x, weight = operands(dense.max_rows(form[0]), 256, 75, form)
    together = lora.stored_mm(x, weight)
    for rows in (1, 2, 3, 5, 6, 7, 11, 32):
        assert torch.equal(lora.stored_mm(x[:rows], weight), together[:rows])
    assert torch.equal(lora.stored_mm(x[5:6], weight), together[5:6])


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 64, 65])
@pytest.mark.parametrize("groups", [1, 4, 8])  # of 16 numbers, which a step would cut
def test_at_the_edge_where_the_library_takes_over(rows: int, groups: int) -> None:
    form = torch.float32, torch.float32, torch.int8, groups
    bias, x, weight = operands(rows, 128, 47, form)
    check(lora.stored_mm(x, weight), x, weight)
    check(lora.stored_addmm(bias, x, weight), x, weight, bias)


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
    name = f"stored_{'addmm' if bias else 'mm'}{'_delta' if with_delta else ''}"
    arguments = [*([added] if bias else []), p.x, [weight[0], *(t.float() for t in weight[1:])]]
    if with_delta:
        # What lies beyond a slot's rank is NaN, which opcheck does not expect of inputs.
        bank = p.bank._replace(A=p.A.nan_to_num(), B=p.B.nan_to_num())
        arguments += [*bank, 1, delta_kernels.build(p.spec)]
    found = torch.library.opcheck(getattr(lora, name).default, tuple(arguments))
    assert set(found.values()) == {"SUCCESS"}


def several(rows: int, form, *, biased: bool) -> tuple[list[Any], list[Tensor]]:
    """Arguments of stored_mms_delta for three siblings of one bank, and what single ops compute."""
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
    op, apart = lora.stored_addmm_delta if biased else lora.stored_mm_delta, []
    for i, (weight, kernel) in enumerate(zip(weights, kernels, strict=True)):
        apart.append(op(*biases[i : i + 1], p.x, weight, *bank, 1, kernel))
    return [p.x, [item for weight in weights for item in weight], biases, *bank, 1, kernels], apart


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_siblings_in_one_op(rows: int, form) -> None:
    """The bits of single ops, by the op's own implementation too."""
    for biased in (False, True):
        arguments, apart = several(rows, form, biased=biased)
        for op in (lora.stored_mms_delta, stored.products_and_deltas):
            assert all(map(torch.equal, op(*arguments), apart))


@needs_compiler
def test_bad_siblings() -> None:
    arguments, _ = several(2, FORMS[0], biased=True)
    lora.stored_mms_delta(*arguments)
    for place, less in ((1, 1), (2, 1), (-1, 3), (-1, 1)):
        wrong = list(arguments)
        wrong[place] = wrong[place][less:]
        with pytest.raises(RuntimeError, match="differ in number"):
            lora.stored_mms_delta(*wrong)
        with pytest.raises(LoweringError, match="differ in number"):
            stored.products_and_deltas(*wrong)
    arguments[-2] = 0  # one owner for all rows
    with pytest.raises(RuntimeError, match="a mixed batch"):
        lora.stored_mms_delta(*arguments)


@needs_compiler
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_of_siblings(biased: bool) -> None:
    arguments, _ = several(3, FORMS[3], biased=biased)
    found = torch.library.opcheck(lora.stored_mms_delta.default, tuple(arguments))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.usefixtures("refused_sources")
def test_a_refused_source() -> None:
    """The ops' own implementations, which run until a kernel is loaded."""
    given = [operands(3, 128, 9, form) for form in FORMS]
    with pytest.warns(LorafxWarning, match="stay with aten: refused"):
        found = [stored.product(x, weight) for _, x, weight in given]
    for y, (bias, x, weight) in zip(found, given, strict=True):
        assert torch.allclose(y.float(), (x @ stored.widened(weight, x.dtype).T).float())
        check(stored.product(bias, x, weight), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x[:, :-1], w), "do not fit together|127 columns, weight has 128"),
        (lambda x, w: (x, [w[0][0], *w[1:]]), "do not fit together|the integers are \\(N, K\\)"),
        (lambda x, w: (x, [w[0], w[1][:-1], w[2]]), "scale"),
        (lambda x, w: (x, [w[0], w[1][:, :3].contiguous(), w[2]]), "scale"),
        (lambda x, w: (x, [w[0], w[1], w[2][:, :1].contiguous()]), "zero"),
        (lambda x, w: (x, w[:1]), "integers"),
    ],
)
def test_bad_operands(change, message) -> None:
    """Refused by the kernel, and by the fake one when a graph is traced."""
    _, x, weight = operands(3, 128, 9, FORMS[3])
    lora.stored_mm(x, weight)
    x, weight = change(x, weight)
    with pytest.raises(RuntimeError, match=message):
        lora.stored_mm(x, weight)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x), [mode.from_tensor(item) for item in weight]
        with pytest.raises((LoweringError, RuntimeError), match=message):
            lora.stored_mm(*fake)
