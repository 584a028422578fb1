"""`lorafx::rows_of`: y as it is; to the analysis of rows, y whose rows are those of x.
`lorafx::checked_index`: the index as it is, or an error; to the analysis of rows a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from lorafx.errors import LorafxError, OutOfRangeError
from lorafx.kernels.ops.row_ops import CHECKED_INDEX
from lorafx.ownership.labels import Label, Mixed, Own
from lorafx.ownership.propagate import flow_through
from lorafx.ownership.symbolic import BatchSymbols

pytestmark = pytest.mark.quick

B, T, K, N = 3, 4, 5, 7


@torch.library.custom_op("lorafx_tests::unknown_kernel", mutates_args=())
def unknown_kernel(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], N)


@unknown_kernel.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], N)


def label_of(fn: Callable[[Tensor], Tensor]) -> Label:
    """The label of fn(x), x (B, T, K) owned along its first dimension."""
    graph = make_fx(fn, tracing_mode="fake")(torch.randn(B, T, K)).graph
    x = next(node for node in graph.nodes if node.op == "placeholder")
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return flow_through(graph, {x: Own(0)}, BatchSymbols.of([B])).labels[result]


def test_is_y() -> None:
    x, y = torch.randn(B, T, K), torch.randn(B, T, N)
    assert torch.equal(torch.ops.lorafx.rows_of(x, y), y)
    opcheck(torch.ops.lorafx.rows_of.default, (x, y))
    ids = torch.zeros(B, T, dtype=torch.int64)
    assert torch.equal(torch.ops.lorafx.rows_of(ids, y), y)


def test_other_rows_are_an_error() -> None:
    with pytest.raises(LorafxError, match="x has 9 rows and y has 12"):
        torch.ops.lorafx.rows_of(torch.randn(3, 3, K), torch.randn(B, T, N))


def test_rows_behind_an_unknown_kernel() -> None:
    """Lost without the op; with it they are those of x, as x then is."""
    kernel, rows_of = torch.ops.lorafx_tests.unknown_kernel, torch.ops.lorafx.rows_of
    assert isinstance(label_of(lambda x: kernel(x)), Mixed)
    assert label_of(lambda x: rows_of(x, kernel(x))) == Own(0)
    assert label_of(lambda x: rows_of(x.transpose(0, 1), kernel(x.transpose(0, 1)))) == Own(1)


def checked(index: Tensor, size: int = 4, *, negative: bool = False, ignored: int | None = None):
    return CHECKED_INDEX(index, size, negative, ignored, "the table", "index{}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_is_the_index(dtype: torch.dtype) -> None:
    index = torch.tensor([[0, 3, 1], [2, 2, 0]], dtype=dtype)
    for given in (index, index.T, index[:, :1].expand(2, 5), index[:0], index[0, 1]):
        assert torch.equal(checked(given), given)
        opcheck(CHECKED_INDEX, (given, 4, False, None, "the table", "index{}"))
    assert checked(index).data_ptr() != index.data_ptr()


def test_refuses_what_is_outside() -> None:
    with pytest.raises(
        OutOfRangeError, match=r"index\[0, 1\] is 4, but the table has 4 entries: 0"
    ):
        checked(torch.tensor([[3, 4]]))
    with pytest.raises(OutOfRangeError, match=r"index\[0\] is -1, .* 2 of 3 are outside"):
        checked(torch.tensor([-1, 0, 9]))
    with pytest.raises(OutOfRangeError, match="index is 4, but"):
        checked(torch.tensor(4))
    with pytest.raises(OutOfRangeError, match=r"index\[1\] is -5, .* -4 to 3"):
        checked(torch.tensor([-4, -5]), negative=True)


def test_rows_stay_whose_they_are() -> None:
    graph = make_fx(lambda index: checked(index), tracing_mode="fake")(
        torch.zeros(3, 3, dtype=torch.int64)
    ).graph
    index, result = graph.find_nodes(op="placeholder")[0], graph.output_node().args[0]
    for dim in (0, 1):
        flow = flow_through(graph, {index: Own(dim)}, BatchSymbols.of([3]))
        assert flow.labels[result] == Own(dim)
