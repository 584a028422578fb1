"""Fake results of calls that passes add: the second of two alike is laid out as if computed."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lorafx.graph.fake_results import FakeResults

pytestmark = pytest.mark.quick

aten = torch.ops.aten


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


def fake(mode: FakeTensorMode, tensor: Tensor, dims: int = 1) -> Any:
    """With so many sizes symbols."""
    kinds = [DimDynamic.DYNAMIC] * dims + [DimDynamic.STATIC] * (tensor.dim() - dims)
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(tensor, symbolic_context=context)


def layout(value: Tensor, base: Tensor) -> tuple[Any, ...]:
    shares = value.untyped_storage()._cdata == base.untyped_storage()._cdata
    numbers = [str(each) for each in (*value.shape, *value.stride(), value.storage_offset())]
    return numbers, value.dtype, value.device, shares


#: op: further arguments.
CALLS: dict[Any, tuple[Any, ...]] = {
    aten.mul.Tensor: (2.5,),
    aten.transpose.int: (0, 1),
    aten.slice.Tensor: (1, 1, 3),
    aten.sum.dim_IntList: ([1],),
    aten.unsqueeze.default: (0,),
    aten.clone.default: (),
}


@pytest.mark.parametrize("op", CALLS, ids=str)
@pytest.mark.parametrize("view", [False, True])
def test_the_second_result_is_laid_out_as_its_own(
    mode: FakeTensorMode, op: Any, view: bool
) -> None:
    results, x = FakeResults(mode), fake(mode, torch.ones(5, 4))
    with mode:
        first, second = x.clone(), x.clone()
        if view:
            first, second = first[1:], second[1:]
    results.call(op, (first, *CALLS[op]), {})
    known = len(results._known)
    got = results.call(op, (second, *CALLS[op]), {})
    with mode:
        want = op(second, *CALLS[op])
    assert len(results._known) == known == 1
    assert layout(got, second) == layout(want, second)
    assert got.fake_mode is mode


def test_what_results_depend_on(mode: FakeTensorMode) -> None:
    """Sizes, strides, types, constants and the operator tell calls apart."""
    results = FakeResults(mode)
    x, y = fake(mode, torch.ones(5, 4)), fake(mode, torch.ones(6, 4))
    with mode:
        turned, half = fake(mode, torch.ones(4, 4), dims=0).t(), x.to(torch.bfloat16)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.mul.Tensor, (x, 2)),
        (aten.mul.Tensor, (x, 2.0)),
        (aten.mul.Tensor, (x, x)),
        (aten.mul.Tensor, (y, 2)),
        (aten.mul.Tensor, (half, 2)),
        (aten.mul.Tensor, (turned, 2)),
        (aten.add.Tensor, (x, 2)),
        (aten.cat.default, ([x, y],)),
        (aten.cat.default, ([y, x, x],)),
    ]
    for op, args in calls:
        got = results.call(op, args, {})
        with mode:
            assert layout(got, args[0] if isinstance(args[0], Tensor) else x) == layout(
                op(*args), args[0] if isinstance(args[0], Tensor) else x
            )
    assert len(results._known) == len(calls)


#: op: further arguments.
SEVERAL: dict[Any, tuple[Any, ...]] = {
    aten.split_with_sizes.default: ([1, 3], 1),
    aten.var_mean.correction: ([1],),
    aten.unbind.int: (1,),
}


@pytest.mark.parametrize("op", SEVERAL, ids=str)
def test_of_several_results_each_is_laid_out_as_its_own(mode: FakeTensorMode, op: Any) -> None:
    results, x = FakeResults(mode), fake(mode, torch.ones(5, 4))
    with mode:
        first, second = x.clone()[1:], x.clone()[1:]
    results.call(op, (first, *SEVERAL[op]), {})
    assert len(results._known) == 1
    got = results.call(op, (second, *SEVERAL[op]), {})
    with mode:
        want = op(second, *SEVERAL[op])
    assert len(results._known) == 1
    assert type(got) is type(want)
    assert [layout(each, second) for each in got] == [layout(each, second) for each in want]
    shared = [{each.untyped_storage()._cdata for each in items} for items in (got, want)]
    assert len(shared[0]) == len(shared[1])
    assert results.call(operator.getitem, (got, 1), {}) is got[1]


def test_results_that_cannot_be_made_anew_are_computed(mode: FakeTensorMode) -> None:
    """One that may lie in either of two operands' memory."""
    results, x = FakeResults(mode), fake(mode, torch.ones(4, 4), dims=0)
    for _ in range(2):
        with mode:
            both = results.call(aten.view_as.default, (x, x.t()), {})
        assert both.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert not results._known
