"""`lorafx::rows_of`: y as it is; to the analysis of rows, y whose rows are those of x."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import lorafx.kernels.ops.row_ops  # noqa: F401  (defines torch.ops.lorafx.rows_of)
from lorafx.errors import LorafxError
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
