"""Kernels of linears whose shrink computes their input, in Triton's interpreter, against float64.

y = x W₁ᵀ (no delta yet)    h = f(y + v₁ B₁)    v₂ = scale · A₂ h    z += v₂ B₂
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from delta_oracle import dense_delta
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from triton_cases import BF16, CPU, FP16, FP32, Case, make_case

import lorafx.kernels.triton.triton_prologue_ops  # noqa: F401  registers the ops
from lorafx.errors import LoweringError
from lorafx.graph.pointwise_region import PointwiseRegion, region_of
from lorafx.kernels.triton.activation import Activation
from lorafx.kernels.triton.strategy_tiles import tiles_for
from lorafx.kernels.triton.triton_build import TritonSpec, build, plan_of
from lorafx.kernels.triton.triton_tiles import ARCHITECTURES

lora = torch.ops.lorafx
#: Slots of requests, and rows of each.
MIXES: dict[str, tuple[tuple[int, ...], int]] = {
    "one row a request": ((0, -1, 2, 1, 0), 1),
    "prefill": ((1, -1, 0, 2), 37),
    "base rows only": ((-1, -1), 5),
    "one adapter": ((3,), 70),
}


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def interleaved(y: Tensor) -> Tensor:
    return F.relu(y[:, ::2]) * (y[:, 1::2] + 1)


@dataclass(frozen=True, eq=False)
class Chain:
    """gate/up and down of one batch, and f between them."""

    up: Case
    down: Case
    activation: Activation
    function: Callable[[Tensor], Tensor]


def make_chain(
    slots: Sequence[int],
    rows: int,
    *,
    K: int = 24,
    sizes: Sequence[int] = (40, 40),
    N: int = 36,
    rank: int = 6,
    dtype: torch.dtype = FP32,
    function: Callable[[Tensor], Tensor] = gated,
) -> Chain:
    common = {"slots": slots, "rows": rows, "rank": rank, "dtypes": (dtype,) * 3, "bias": False}
    up = make_case(K=K, sizes=sizes, capacity=4, seed=1, **common)
    down = make_case(K=sum(sizes) // 2, sizes=(N,), capacity=4, seed=2, **common)
    graph = make_fx(function, tracing_mode="fake")(up.problem.y).graph
    found = region_of(graph.output_node().args[0])
    assert isinstance(found, PointwiseRegion), found
    return Chain(up, down, found.activation, function)


def run(chain: Chain, arch: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(h, the sum of v's planes with 0 where there is no factor, z)."""
    up, down = chain.up.problem, chain.down.problem
    M, rows = up.x.shape[0], up.rows
    spec = TritonSpec(chain.up.spec.delta)
    chosen = None if arch is None else tiles_for("deferred", spec.delta, M, ARCHITECTURES[arch])
    first = build(spec, "deferred", rows_hint=M, device=CPU, tiles=chosen)
    assert first is not None
    v = lora.triton_shrink(up.x, *up.bank, rows, first)
    (leaf,) = chain.activation.leaves
    leaf = replace(leaf, delta=spec.delta, planes=v.shape[0])
    second = replace(chain.down.spec, activation=replace(chain.activation, leaves=(leaf,)))
    chosen = None if arch is None else tiles_for("prologue", second.delta, M, ARCHITECTURES[arch])
    kernel = build(second, "prologue", rows_hint=M, device=CPU, tiles=chosen)
    assert kernel is not None
    inputs = [up.y, v, up.B, up.ranks]
    h, v = lora.triton_activate(inputs, *down.bank, rows, kernel)
    z = down.y.clone()
    lora.triton_expand_(z, v, *down.bank, rows, kernel)
    return h, v, z


def assert_right(chain: Chain, got: tuple[Tensor, Tensor, Tensor]) -> None:
    up, down = chain.up.problem, chain.down.problem
    h, _, z = got
    y, magnitude = dense_delta(up.with_(y=up.y.double()))
    want = chain.function(y)
    eps = torch.finfo(h.dtype).eps
    unit = eps + (2.0**-16 if h.dtype != FP32 else 64 * 2.0**-24)
    # f is Lipschitz in y on this range; y's own error is in proportion to its terms.
    slope = 4 * (1 + magnitude.amax(1, keepdim=True))
    assert not h.isnan().any(), "NaN from factors that no row owns"
    assert ((h.double() - want).abs() <= unit * (1 + want.abs()) * slope).all()
    exact, size = dense_delta(down.with_(x=h, y=down.y.double()))
    bound = eps * exact.abs() + (2.0**-16 if h.dtype != FP32 else 256 * 2.0**-24) * (1 + size)
    assert not z.isnan().any()
    assert ((z.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, dtype: torch.dtype) -> None:
    chain = make_chain(*MIXES[mix], dtype=dtype)
    assert_right(chain, run(chain))


@pytest.mark.parametrize("rank", [1, 16, 33, 64])
def test_ranks(rank: int) -> None:
    chain = make_chain((0, 3, -1, 1), 3, rank=rank)
    assert_right(chain, run(chain))


def test_interleaved_columns_of_one_sibling() -> None:
    chain = make_chain((0, -1, 1), 4, sizes=(66,), function=interleaved, dtype=BF16)
    assert_right(chain, run(chain))


@pytest.mark.parametrize("arch", ["cuda90", "gfx942"])
@pytest.mark.parametrize("mix", ["one row a request", "prefill"])
def test_the_tiles_of_a_gpu(mix: str, arch: str) -> None:
    chain = make_chain(*MIXES[mix], K=64, sizes=(272, 272), N=64, rank=16, dtype=BF16)
    assert_right(chain, run(chain, arch))


def test_a_base_row_keeps_its_bits() -> None:
    chain = make_chain((0, -1, 2), 9)
    alone = replace(
        chain,
        up=chain.up.with_(slots=torch.full((3,), -1, dtype=torch.int32)),
        down=chain.down.with_(slots=torch.full((3,), -1, dtype=torch.int32)),
    )
    mixed, base = run(chain), run(alone)
    assert torch.equal(mixed[0][9:18], base[0][9:18])
    assert torch.equal(mixed[2][9:18], base[2][9:18])
    assert not torch.equal(mixed[0][:9], base[0][:9])


@pytest.mark.parametrize("layer", ["up", "down"])
def test_infinite_factors_spoil_their_own_rows_only(layer: str) -> None:
    chain = make_chain((0, 1, -1, 0), 8)
    want = run(chain)
    case: Case = getattr(chain, layer)
    for name in ("A", "B"):
        factors = getattr(case.problem, name).clone()
        factors[1] = torch.inf
        h, _, z = run(replace(chain, **{layer: case.with_(**{name: factors})}))
        others = torch.cat([torch.arange(8), torch.arange(16, 32)])
        assert torch.equal(h[others], want[0][others])
        assert torch.equal(z[others], want[2][others])
        assert not z[8:16].isfinite().all()


def test_ops_are_what_torch_expects() -> None:
    chain = make_chain((0, 0), 3, dtype=BF16)  # all of v is written
    up, down = chain.up.problem, chain.down.problem
    first = build(TritonSpec(chain.up.spec.delta), "deferred", rows_hint=6, device=CPU)
    opcheck(lora.triton_shrink.default, (up.x, *up.bank, up.rows, first))
    v = lora.triton_shrink(up.x, *up.bank, up.rows, first)
    (leaf,) = chain.activation.leaves
    leaf = replace(leaf, delta=chain.up.spec.delta, planes=v.shape[0])
    spec = replace(chain.down.spec, activation=replace(chain.activation, leaves=(leaf,)))
    kernel = build(spec, "prologue", rows_hint=6, device=CPU)
    inputs = [up.y, v, up.B, up.ranks]
    shape_checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (inputs, *down.bank, down.rows, kernel)
    opcheck(lora.triton_activate.default, arguments, test_utils=shape_checks)
    _, v = lora.triton_activate(*arguments)
    opcheck(lora.triton_expand_.default, (down.y.clone(), v, *down.bank, down.rows, kernel))


def test_no_rows() -> None:
    chain = make_chain((0,), 4)
    up = chain.up.problem
    kernel = build(TritonSpec(chain.up.spec.delta), "deferred", rows_hint=4, device=CPU)
    assert lora.triton_shrink(up.x[:0], *up.bank, up.rows, kernel).shape[1] == 0


def test_what_the_kernels_were_not_made_for_is_refused() -> None:
    chain = make_chain((0, -1), 3)
    up, down = chain.up.problem, chain.down.problem
    spec = replace(chain.down.spec, activation=chain.activation)
    kernel = build(spec, "prologue", rows_hint=6, device=CPU)
    assert kernel is not None
    assert [k.name for k in plan_of(kernel).all_kernels] == ["activate", "expand"]
    with pytest.raises(LoweringError, match="2 inputs, not 1"):
        lora.triton_activate([up.y, up.y], *down.bank, 3, kernel)
    with pytest.raises(LoweringError, match="more than 79 columns"):
        lora.triton_activate([up.y[:, :60]], *down.bank, 3, kernel)
    with pytest.raises(LoweringError, match="v is"):
        lora.triton_expand_(down.y, torch.zeros(9, 6, 6), *down.bank, 3, kernel)
    with pytest.raises(LoweringError, match="needs the activation"):
        build(chain.down.spec, "prologue", rows_hint=6, device=CPU)
