"""factors on small graphs: PEFT's arithmetic becomes one op, what only looks like it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lorafx.capture.lowering import decomposition_table
from lorafx.config import Options
from lorafx.graph.peft_context import PeftContext
from lorafx.kernels.factor_ops import FACTORS
from lorafx.passes.factors import Factors
from lorafx.passes.lower_factors import LowerFactors

M, K, N, R = 6, 5, 7, 3
F32, BF16 = torch.float32, torch.bfloat16


def operands(dtype: torch.dtype = F32, factors: torch.dtype = F32) -> tuple[Tensor, ...]:
    """(x, W, A, B, b)"""
    torch.manual_seed(0)
    x, W = torch.randn(2, M // 2, K).to(dtype), torch.randn(N, K).to(dtype)
    return x, W, torch.randn(R, K).to(factors), torch.randn(N, R).to(factors), torch.randn(N)


def traced(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph as AOTAutograd would hand it over."""
    table = decomposition_table()
    entry = lambda *flat: function(*flat)  # noqa: E731  (make_fx counts default arguments)
    return make_fx(entry, table, tracing_mode="fake")(*arguments)


def rewritten(
    function: Callable[..., Any], arguments: tuple[Tensor, ...], lowering: str = "reference"
) -> tuple[fx.GraphModule, PeftContext, int]:
    """The traced function after the passes, which computes what it did."""
    want = function(*arguments)
    gm = traced(function, arguments)
    ctx = PeftContext(Options(lowering=lowering), gm)
    edits = Factors().run(gm, ctx)
    LowerFactors().run(gm, ctx)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    got = gm(*arguments)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    tolerance = 1e-5 if want.dtype == F32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return gm, ctx, edits


def count(gm: fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """As AOTAutograd has it: views around a product."""
    flat = torch.ops.aten.view(x, [-1, x.shape[-1]])
    right = torch.ops.aten.permute(W, [1, 0])
    y = torch.mm(flat, right) if bias is None else torch.addmm(bias, flat, right)
    return torch.ops.aten.view(y, [*x.shape[:-1], W.shape[0]])


def lora(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Any = 0.5) -> Tensor:
    return linear(x, W) + linear(linear(x, A), B) * scale


def test_one_adapter() -> None:
    gm, ctx, edits = rewritten(lora, operands()[:4])
    assert edits == 1
    assert count(gm, FACTORS.default) == 1
    assert count(gm, torch.ops.aten.mm.default) == 1  # the base's
    (site,) = ctx.sites.values()
    assert (site.in_features, site.out_features, site.rank) == (K, N, R)


def test_lowered_in_place() -> None:
    gm, _, _ = rewritten(lora, operands()[:4], lowering="inductor")
    assert count(gm, torch.ops.higher_order.auto_functionalized) == 1
    assert count(gm, FACTORS.default) == 0


@pytest.mark.parametrize("form", ["no scale", "left", "twice"])
def test_forms(form: str) -> None:
    def function(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        delta = linear(linear(x, A), B)
        if form == "left":
            return delta * 0.5 + linear(x, W)
        return linear(x, W) + (delta if form == "no scale" else delta * 3 * 0.5)

    assert rewritten(function, operands()[:4])[2] == 1


def test_several_adapters() -> None:
    def function(x: Tensor, W: Tensor, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        return lora(x, W, A, B) + linear(linear(x, A2), B2) * 2.0

    more = torch.randn(2, K), torch.randn(N, 2)
    gm, _, edits = rewritten(function, (*operands()[:4], *more))
    assert edits == 2
    assert count(gm, torch.ops.aten.mm.default) == 1


def test_scale_that_is_an_input() -> None:
    gm, _, edits = rewritten(lora, (*operands()[:4], torch.tensor(0.5, dtype=torch.float64)))
    assert edits == 1
    assert count(gm, FACTORS.tensor) == 1


def test_bias() -> None:
    def function(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
        return linear(x, W) + linear(linear(x, A), B, b) * 0.5

    assert rewritten(function, operands())[2] == 1


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("back", [True, False])
def test_wider_factors(active: int, back: bool) -> None:
    """float32 adapters on a bfloat16 base: one op rounds once; a wide result stays wide."""

    def function(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        result, wide = linear(x, W), x.to(F32)
        for _ in range(active):
            result = result + linear(linear(wide, A), B) * 0.5
        return result.to(BF16) if back else result

    gm, ctx, edits = rewritten(function, operands(BF16)[:4])
    assert edits == active
    casts = count(gm, torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)
    assert casts == (0 if active == 1 and back else 2 if back else 1)
    first = next(iter(ctx.sites))
    assert first.args[1].meta["val"].dtype == BF16  # x itself, not its cast


def _by_a_vector(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return linear(x, W) + linear(linear(x, A), B) * b


def _computed_factor(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return linear(x, W) + linear(linear(x, A * 2), B)


def _between(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return linear(x, W) + linear(linear(x, A).relu(), B)


def _subtracted(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.sub(linear(x, W), linear(linear(x, A), B))


def _read_twice(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    delta = linear(linear(x, A), B)
    return (linear(x, W) + delta) * delta


def _broadcast(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return b + linear(linear(x, A), B)


def _alpha(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return torch.add(linear(x, W), linear(linear(x, A), B), alpha=2)


@pytest.mark.parametrize(
    "function",
    [
        _by_a_vector,
        _computed_factor,
        _between,
        _subtracted,
        _read_twice,
        _broadcast,
        _alpha,
    ],
)
def test_left_alone(function: Callable[..., Tensor]) -> None:
    assert rewritten(function, operands())[2] == 0


def test_strided_factors_are_left_with_a_reason() -> None:
    x, W, A, B, _ = operands()
    _gm, ctx, edits = rewritten(lora, (x, W, A, B.T.contiguous().T))
    assert edits == 0
    assert "not contiguous" in ctx.left[0]


def test_base_that_something_else_reads() -> None:
    """The op is functional: y keeps its value for its other readers."""

    def function(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = linear(x, W)
        return torch.cat([y + linear(linear(x, A), B), y])

    assert rewritten(function, operands()[:4])[2] == 1
    assert rewritten(function, operands()[:4], lowering="inductor")[2] == 1


def test_edits_can_be_bisected() -> None:
    gm = traced(lora, operands()[:4])
    assert Factors().run(gm, PeftContext(Options(lowering="reference", max_edits=0), gm)) == 0
