"""Every op under each transform of torch.func and torch.autograd: what it gives is the derivative
of its reference, or an error. torch would take zeros for an operator of Python's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import lorafx.kernels.cpu.dense_attention
import lorafx.kernels.cpu.weight_mm
import lorafx.model.marks
import lorafx.package.load  # noqa: F401  (all define ops)
from lorafx.errors import CaptureError
from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.kernels.cpu.stored_grouped_mm import STORED_GROUPED_MM
from lorafx.kernels.ops.op_library import _LIBRARY

ops = torch.ops.lorafx
S, R, K, N = 2, 2, 4, 6


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _bank(slots: int, k: int = K, columns: int = N) -> tuple[Tensor, ...]:
    ranks = torch.full((slots, 1), R, dtype=torch.int32)
    factors = _numbers(slots, R, k), _numbers(slots, R, columns)
    return (*factors, ranks, torch.ones(slots, 1), torch.zeros(1, dtype=torch.int32))


X, Y, RANGES = _numbers(3, K), _numbers(3, N), ([0], [0], [N])
IDS = torch.tensor([0, 1, 1])
EMBEDDING = (_numbers(S, 5, R), *_bank(S)[1:])
OWN = _numbers(1, 2, K), torch.tensor([[0, 1]], dtype=torch.int32)
TABLE = torch.tensor([[0, 0, 2, 0], [-1, 0, 0, 0]], dtype=torch.int32)
GROUPS = torch.tensor([1, 3], dtype=torch.int32)
ONE_SLOT = torch.zeros(1, dtype=torch.int32)
#: The arguments of each op; the first floating-point tensor is differentiated.
CALLS: dict[str, tuple[Any, ...]] = {
    "site": (X, Y, *_bank(S), *RANGES, 1),
    "embedding_site": (IDS, Y, *EMBEDDING, 1),
    "fused_linear": (X, _numbers(N, K), None, *_bank(S), *RANGES, 1, False),
    "conv_site": (
        *(_numbers(3, 1, 6), _numbers(3, N, 3), *_bank(S), 1, [4], [1], [0, 0]),
        *(None, None, None),
    ),
    "grouped_site": (X, Y, *_bank(S), *RANGES, 1, 0, 1, [0, 0, 1], [0, 0, 1], False),
    "expert_mark": (Y, _numbers(2, R, K)),
    "expert_site": (X, Y, *_bank(4), IDS, *RANGES, 1, 2),
    "rows_of": (X, Y),
    "own_linear": (X, Y, *OWN, TABLE, _numbers(1, 2), None, None, ONE_SLOT, 1),
    "own_input": (X, OWN[0], TABLE, ONE_SLOT, 1),
    "own_embedding": (
        *(IDS, Y, _numbers(1, 2, N), torch.tensor([[0, 1, -1]], dtype=torch.int32)),
        *(TABLE, ONE_SLOT, 1),
    ),
    "grouped_mm": (X, _numbers(2, K, N), GROUPS),
    "stored_grouped_mm": (
        *(X, [torch.arange(2 * N * K, dtype=torch.int8).view(2, N, K), torch.ones(2, 1, 1)]),
        *(GROUPS, "affine", [2, N, K], False),
    ),
}
#: Ops without a floating-point result of an argument.
OF_INDICES = {"checked_index", "expert_slots", "own_mask"}


def test_every_op_is_here_or_is_called_by_compiled_graphs_alone() -> None:
    names = {name.partition("::")[2].partition(".")[0] for name in _LIBRARY._op_defs}
    written = {n for n in names if getattr(ops, n).default._schema.is_mutable}
    lowered = {n for n in names if n.startswith(("weight_", "layer_"))} | {"attention"}
    assert names - written - lowered == CALLS.keys() | OF_INDICES


def _function(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    call = CALLS[name]
    places = [i for i, item in enumerate(call) if isinstance(item, Tensor)]
    place = next(i for i in places if call[i].is_floating_point())

    def run(x: Tensor) -> Tensor:
        result: Tensor = getattr(ops, name)(*call[:place], x, *call[place + 1 :])
        return result

    return run, call[place]


def _dual(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Any = forward_ad.unpack_dual(run(forward_ad.make_dual(x, torch.ones_like(x))))
        assert tangent.tangent is not None
        return torch.as_tensor(tangent.tangent).clone()


def _backward(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run(x).sum(), x)[0]


def _mapped_grad(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    stacked = torch.stack([x, x])
    mapped: Any = torch.func.vmap(torch.func.grad(lambda part: run(part).sum()))(stacked)
    return torch.as_tensor(mapped)[0]


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "autograd": _backward,
    "grad": lambda run, x: torch.func.grad(lambda part: run(part).sum())(x),
    "vjp": lambda run, x: torch.func.vjp(run, x)[1](torch.ones_like(run(x)))[0],
    "mapped": _mapped_grad,
    "forward_ad": _dual,
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda run, x: torch.func.jacrev(run)(x),
    "jacfwd": lambda run, x: torch.func.jacfwd(run)(x),
    "hessian": lambda run, x: torch.func.hessian(lambda part: run(part).square().sum())(x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_it_has_its_derivative_or_raises(name: str, way: str) -> None:
    run, x = _function(name)
    if name == "grouped_mm" and way == "autograd":
        parts = zip((0, 1), (1, 3), CALLS[name][1], strict=True)
        ones = [torch.ones(end - start, N) @ weight.T for start, end, weight in parts]
        torch.testing.assert_close(WAYS[way](run, x), torch.cat(ones))
        return
    with pytest.raises(CaptureError, match="no derivative of this kind"):
        WAYS[way](run, x)


@pytest.mark.parametrize(
    "name", [n for n in CALLS if n != "stored_grouped_mm"]
)  # torch maps no lists
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_is_mapped_as_it_is_called(name: str) -> None:
    run, x = _function(name)
    one_by_one = torch.stack([run(part) for part in (x, 2 * x)])
    torch.testing.assert_close(torch.func.vmap(run)(torch.stack([x, 2 * x])), one_by_one)


def test_the_forward_runs_with_gradients_enabled() -> None:
    call = CALLS["site"]
    with_gradients = ops.site(call[0], call[1].clone().requires_grad_(), *call[2:])
    torch.testing.assert_close(with_gradients, ops.site(*call))
    assert GROUPED_MM is not None
    assert STORED_GROUPED_MM is not None
