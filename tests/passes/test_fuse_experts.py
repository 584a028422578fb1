"""fuse, plan and lower on products with routed experts, on graphs built by hand: one node for a
product, kernels for a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback
from compile_only_gpu import CUDA, compile_only_gpu, on_cuda
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, Holder, SiteGraph
from torch import fx, nn

from lorafx.op_arguments import rebind
from lorafx.passes.fuse.fuse import Fuse
from lorafx.passes.fuse.fuse_experts import FUSED_EXPERTS
from lorafx.passes.lower.lower import Lower
from lorafx.passes.match.match import Match
from lorafx.passes.plan import Plan

aten = torch.ops.aten
E, H, WIDTH, EACH = 3, 32, 16, 4
ROWS = [0, -1, 2]
M = EACH * len(ROWS)
ENDS = torch.tensor([5, 5, M], dtype=torch.int32)
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
KERNEL_CALL = torch.ops.higher_order.triton_kernel_wrapper_functional
LOOP = torch.ops.transformers.grouped_mm_fallback.default


class Experts(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * WIDTH, H).to(dtype) / H**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, H, WIDTH).to(dtype) / WIDTH**0.5)


def graph_of(
    *,
    lowering: str = "triton",
    dtype: torch.dtype = torch.float32,
    loop: bool = True,
) -> tuple[SiteGraph, Finished]:
    """Two products with experts."""
    torch.manual_seed(0)
    g = SiteGraph(Holder(experts=Experts(dtype)), ROWS, lowering=lowering, targets=["experts"])
    x = g.argument(torch.randn(M, H).to(dtype))
    ends = g.argument(ENDS.clone())
    weights = [g.weight(path, path.rpartition(".")[2]) for path in (UP, DOWN)]
    g.input(g.program.runtime.slots)
    product = LOOP if loop else aten._grouped_mm.default
    y = g.call(product, x, g.call(aten.permute.default, weights[0], [0, 2, 1]), ends)
    gate = g.call(aten.slice.Tensor, y, 1, 0, WIDTH)
    up = g.call(aten.slice.Tensor, y, 1, WIDTH, 2 * WIDTH)
    h = g.call(aten.mul.Tensor, g.call(aten.silu.default, gate), up)
    out = g.call(product, h, g.call(aten.permute.default, weights[1], [0, 2, 1]), ends)
    done = g.output(out)
    done.run(Match())
    for node in done.ctx.states:  # as provenance would: EACH rows a request
        rebind(node, rows=EACH)
    return g, done


def fused(done: Finished) -> list[fx.Node]:
    return [node for node in done.gm.graph.nodes if node.target is FUSED_EXPERTS]


def pin(done: Finished, **plan: str) -> None:
    program = done.ctx.program
    named = {f"experts.{name}": strategy for name, strategy in plan.items()}
    program.options = replace(program.options, plan=named)


def strategies(done: Finished) -> dict[str, str]:
    return {
        s.site.path: s.strategy.partition(" ")[0]
        for states in done.ctx.states.values()
        for s in states
    }


@pytest.mark.parametrize(
    ("up", "down"),
    [("grouped", "grouped"), ("segments", "gemv")],
)
def test_every_plan_gives_the_same(up: str, down: str) -> None:
    _, plain = graph_of(lowering="reference")
    plain.run(Fuse())
    assert not fused(plain)
    (want,) = plain.result()
    _, done = graph_of()
    pin(done, gate_up_proj=up, down_proj=down)
    assert done.run(Fuse()) == 2
    assert len(fused(done)) == 2
    assert error(*done.result(), want) <= 1e-5
    done.run(Plan(), Lower())
    assert strategies(done) == {UP: up, DOWN: down}
    ops = done.targets()
    assert ops.count("triton_experts.default") == [up, down].count("grouped")
    assert ops.count("grouped_mm_fallback.default") == 2 - ops.count("triton_experts.default")
    assert error(*done.result(), want) <= 1e-5


def test_the_graph_before_and_after() -> None:
    _, done = graph_of()
    assert_expected_inline(
        shown(done, Fuse()),
        """\
permute = aten.permute(experts_gate_up_proj_gate_up_proj, [0, 2, 1])
grouped_mm_fallback = transformers.grouped_mm_fallback(x, permute, x_1)
iota = prims.iota(12, start=0, step=1, dtype=torch.int32, device=cpu, requires_grad=False)
searchsorted = aten.searchsorted.Tensor(x_1, iota, out_int32=True, right=True)
expert_site = lorafx.expert_site(x, grouped_mm_fallback, bank, slots, searchsorted, [0, 1],
    [0, 16], [16, 16], 4, 3)
slice = aten.slice.Tensor(expert_site, 1, 0, 16)
slice_1 = aten.slice.Tensor(expert_site, 1, 16, 32)
silu = aten.silu(slice)
mul = aten.mul.Tensor(silu, slice_1)
permute_1 = aten.permute(experts_down_proj_down_proj, [0, 2, 1])
grouped_mm_fallback_1 = transformers.grouped_mm_fallback(mul, permute_1, x_1)
iota_1 = prims.iota(12, start=0, step=1, dtype=torch.int32, device=cpu, requires_grad=False)
searchsorted_1 = aten.searchsorted.Tensor(x_1, iota_1, out_int32=True, right=True)
expert_site_1 = lorafx.expert_site(mul, grouped_mm_fallback_1, bank, slots, searchsorted_1,
    [0], [0], [32], 4, 3)
return expert_site_1

fuse: 2 edits

iota = prims.iota(12, start=0, step=1, dtype=torch.int32, device=cpu, requires_grad=False)
searchsorted = aten.searchsorted.Tensor(x_1, iota, out_int32=True, right=True)
fused_experts = lorafx.fused_experts(x, experts_gate_up_proj_gate_up_proj, x_1, bank, slots,
    searchsorted, [0, 1], [0, 16], [16, 16], 4, False)
slice = aten.slice.Tensor(fused_experts, 1, 0, 16)
slice_1 = aten.slice.Tensor(fused_experts, 1, 16, 32)
silu = aten.silu(slice)
mul = aten.mul.Tensor(silu, slice_1)
iota_1 = prims.iota(12, start=0, step=1, dtype=torch.int32, device=cpu, requires_grad=False)
searchsorted_1 = aten.searchsorted.Tensor(x_1, iota_1, out_int32=True, right=True)
fused_experts_1 = lorafx.fused_experts(mul, experts_down_proj_down_proj, x_1, bank, slots,
    searchsorted_1, [0], [0], [32], 4, False)
return fused_experts_1
""",
    )


def test_lowered_for_a_gpu() -> None:
    """Two launches a product, no opaque op, no product of the vendor's."""
    g, done = graph_of(dtype=torch.bfloat16, loop=False)
    pin(done, gate_up_proj="grouped", down_proj="grouped")
    done.run(Fuse())
    on_cuda(g.mode, done.gm)
    with compile_only_gpu():
        done.run(Plan(), Lower())
    calls = [node for node in done.gm.graph.nodes if node.target is KERNEL_CALL]
    assert len(calls) == 4
    for node in done.gm.graph.nodes:
        if node.op == "call_function":
            assert getattr(node.target, "namespace", "") not in ("lorafx", "transformers")
    ops = done.targets()
    assert "_grouped_mm.default" not in ops
    assert "searchsorted.Tensor" not in ops
    (output,) = next(n for n in done.gm.graph.nodes if n.op == "output").args[0]
    assert output.meta["val"].shape == (M, H)
    assert output.meta["val"].device == CUDA
