"""The in-place ops in graphs that Inductor compiles: y's buffer is written, never copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from delta_oracle import Problem, assert_delta, random_problem
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from lorafx.kernels.cpu.delta_kernels import delta_call


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
