"""Products by function, one upon the other: each of an operand with the deltas before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_merge import check_mixed
from torch import Tensor, nn

pytestmark = pytest.mark.quick

NAMES = ["a", None, "b", "a"]
K = 6


class Row(nn.Module):
    """What a function makes of its modules and x."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **modules: Callable[[], nn.Module]):
        super().__init__()
        self.use = use
        for name, make in modules.items():
            self.add_module(name, make())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.use(self, x)}


def linear(n: int = K, k: int = K) -> Callable[[], nn.Module]:
    return partial(nn.Linear, k, n)


def conv(c: int, n: int) -> Callable[[], nn.Module]:
    return partial(nn.Conv2d, c, n, 3, padding=1)


def convolved(m: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, m.bias, padding=1)


def words() -> Tensor:
    return torch.randn(4, 3, K)


def images() -> Tensor:
    return torch.randn(4, 2, 5, K)


ROWS: dict[str, tuple[Any, Callable[[], Tensor], dict[str, Any]]] = {
    "two convolutions": (
        lambda m, x: convolved(m.b, convolved(m.a, x)),
        images,
        {"a": conv(2, 3), "b": conv(3, 4)},
    ),
    "three linears, the last one first": (
        lambda m, x: F.linear(F.linear(F.linear(x, m.c.weight), m.b.weight), m.a.weight, m.a.bias),
        words,
        {"a": linear(9), "b": linear(), "c": linear()},
    ),
    "linear, convolution, linear": (
        lambda m, x: F.linear(convolved(m.b, F.linear(x, m.a.weight)), m.c.weight),
        images,
        {"a": linear(), "b": conv(2, 3), "c": linear()},
    ),
    "embedding, then linear": (
        lambda m, x: F.linear(F.embedding(x, m.a.weight), m.b.weight),
        lambda: torch.randint(0, 9, (4, 3)),
        {"a": partial(nn.Embedding, 9, K), "b": linear()},
    ),
    "a product as the bias": (
        lambda m, x: torch.addmm(x[:, 0] @ m.b.weight.T, x[:, 1], m.a.weight.T),
        words,
        {"a": linear(), "b": linear()},
    ),
    "one weight again": (
        lambda m, x: F.linear(F.linear(x, m.a.weight), m.a.weight),
        words,
        {"a": linear()},
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_product_takes_the_deltas_before_it(small: Any, row: str) -> None:
    use, inputs, modules = ROWS[row]
    case = small(partial(Row, use, **modules), list(modules), list(modules)[:1])
    cm, x = case.compile(), {"x": inputs()}
    check_mixed(cm, case, NAMES, x)
    check_mixed(cm, case, ["a"] * 4, x)
