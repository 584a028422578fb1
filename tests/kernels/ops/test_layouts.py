"""Tensors that are not contiguous: right results, and no hidden copy of x, W or a bank; nor of y in
the graphs that Inductor compiles.

A *hidden copy* is an allocation at least half as large as the smallest of x, W and the bank's two
factors, which the same call makes for this layout and not for the contiguous one. What the base's
own product allocates for a layout is not counted: the base model makes that copy too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from delta_oracle import Problem, assert_delta, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, large, last_first
from toolchain import needs_compiler
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from lorafx.kernels.cpu.delta_kernels import build, delta_call

lora = torch.ops.lorafx


def add(p: Problem, *, generated: bool) -> Tensor:
    """y after the delta was added into a copy of it of the same strides."""
    y = torch.empty_strided(p.y.shape, p.y.stride()).copy_(p.y)
    if generated:
        op = lora.run_embedding_delta_ if p.embedding else lora.run_delta_
        op(y, p.x, *p.bank, p.rows, build(p.spec))
    elif p.embedding:
        lora.add_embedding_delta_(y, p.x, *p.bank, p.rows)
    else:
        lora.add_delta_(y, p.x, *p.bank, *p.ranges, p.rows)
    return y


@st.composite
def strided(draw: st.DrawFn, t: Tensor) -> Tensor:
    """`t` with its values in a buffer in which its dimensions lie in another order, at other steps,
    after an offset; what lies between is NaN (0 for ids)."""
    order = draw(st.permutations(range(t.dim())))
    steps = draw(st.lists(st.integers(1, 3), min_size=t.dim(), max_size=t.dim()))
    offset = draw(st.integers(0, 3))
    strides, reach = [0] * t.dim(), 1
    for dim in order:
        strides[dim] = reach * steps[dim]
        reach = strides[dim] * t.shape[dim]
    gap = torch.nan if t.is_floating_point() else 0
    buffer = torch.full((offset + max(reach, 1),), gap, dtype=t.dtype)
    return buffer.as_strided(t.shape, strides, offset).copy_(t)


@st.composite
def problems(draw: st.DrawFn, vocabulary: int | None = None) -> Problem:
    leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    rows = draw(st.integers(1, 3))
    sizes = (11,) if vocabulary else (11, 6)
    return random_problem(
        x_shape=leading if vocabulary else (*leading, 19),
        slots=draw(st.lists(st.integers(-1, 3), min_size=1, max_size=4)),
        rows=rows,
        sizes=sizes,
        vocabulary=vocabulary,
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("vocabulary", [None, 23])
@settings(max_examples=50)
@given(data=st.data())
def test_any_strides(vocabulary: int | None, data: st.DataObject) -> None:
    """Aten takes x, y, A, B, ranks, scales and slots laid out at random, generated code x and y."""
    p = data.draw(problems(vocabulary))
    fields = ("x", "y", "A", "B", "ranks", "scales", "slots")
    laid = p.with_(**{name: data.draw(strided(getattr(p, name))) for name in fields})
    assert_delta(p, add(laid, generated=False))
    if (kernel := build(p.spec)) is None:
        return  # no compiler
    op = lora.run_embedding_delta_ if vocabulary else lora.run_delta_
    op(laid.y, laid.x, *p.bank, p.rows, kernel)
    assert torch.equal(laid.y, add(p, generated=True))


@needs_compiler
def test_a_transposed_bank_is_refused_by_kernels_and_served_by_aten() -> None:
    p = random_problem(x_shape=(5, 19), slots=(2, -1, 0), rows=1, sizes=(11,))
    kernel = build(p.spec)
    for name in ("A", "B"):
        laid = p.with_(**{name: last_first(getattr(p, name))})
        assert build(laid.spec) is None
        assert_delta(laid, add(laid, generated=False))
        with pytest.raises(RuntimeError, match="A and B are not a bank of the kernel's"):
            lora.run_delta_(p.y, p.x, *laid.bank, p.rows, kernel)


def big_problem() -> Problem:
    return random_problem(
        x_shape=(6, 50, 400), slots=(2, -1, 0, 1, 1, 3), rows=50, sizes=(300,), max_rank=64
    )


@pytest.mark.parametrize("tensor", ["x", "B"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_aten_copies_nothing_for_a_layout(layout: str, tensor: str) -> None:
    p = big_problem()
    least = min(t.nbytes for t in (p.x, p.A, p.B))
    laid = p.with_(**{tensor: LAYOUTS[layout](getattr(p, tensor))})
    for op in ("add", "site"):

        def call(q: Problem, op: str = op) -> None:
            if op == "add":
                lora.add_delta_(q.y, q.x, *q.bank, *q.ranges, q.rows)
            else:
                lora.site(q.x, q.y, *q.bank, *q.ranges, q.rows)

        wanted = large(lambda: call(p), least)
        assert large(lambda: call(laid), least) == wanted


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def traced(p: Problem, aten: bool = False) -> Callable[..., Tensor]:
    """(x, weight, *bank) -> x W + delta, by the op that `lower` would choose."""
    spec = p.spec
    kernel = None if aten else delta_call(spec, p.y, p.x, *p.bank, rows=p.rows)[1][-1]

    def function(x: Tensor, weight: Tensor, *bank: Tensor) -> Tensor:
        y = x @ weight
        if aten:
            torch.ops.lorafx.add_delta_(y, x, *bank, *p.ranges, p.rows)
        else:
            torch.ops.lorafx.run_delta_(y, x, *bank, p.rows, kernel)
        return y

    return function


def with_product(p: Problem, weight: Tensor) -> Problem:
    return p.with_(y=p.x @ weight)


@pytest.mark.parametrize("aten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_delta_lands_in_the_products_buffer(aten: bool, dtype: torch.dtype) -> None:
    p = random_problem(x_shape=(12, 7), slots=(2, -1, 0, 1), rows=3, dtypes=(dtype,) * 3)
    weight = torch.randn(7, 30).to(dtype)
    compiled = torch.compile(traced(p, aten), fullgraph=True)
    with torch.no_grad():
        y, (code, *_) = run_and_get_code(compiled, p.x, weight, *p.bank)
    assert_delta(with_product(p, weight), y)
    assert ("add_delta_" if aten else "run_delta_") in code
    assert "cpp_fused" not in code  # a copy of y would be a generated pointwise kernel
    assert "clone" not in code.replace("clone_preserve_strides", "")
    assert "copy_" not in code
