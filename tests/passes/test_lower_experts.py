"""plan and lower on products with routed experts, on graphs built by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback
from compile_only_gpu import CUDA, compile_only_gpu, on_cuda
from dense_merge import error
from site_graphs import Finished, Holder, SiteGraph
from torch import nn

from lorafx.op_arguments import rebind
from lorafx.passes.lower import Lower
from lorafx.passes.match import Match
from lorafx.passes.plan import Plan

aten = torch.ops.aten
E, H, WIDTH, EACH = 3, 32, 16, 4
ROWS = [0, -1, 2]
M = EACH * len(ROWS)
ENDS = torch.tensor([5, 5, M], dtype=torch.int32)
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
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


def test_planned_kernels_give_the_same() -> None:
    _, plain = graph_of(lowering="reference")
    plain.run(Lower())
    (want,) = plain.result()
    _, done = graph_of()
    pin(done, gate_up_proj="segments", down_proj="gemv")
    done.run(Plan(), Lower())
    assert strategies(done) == {UP: "segments", DOWN: "gemv"}
    assert done.targets().count("grouped_mm_fallback.default") == 2
    assert error(*done.result(), want) <= 1e-5


def test_lowered_for_a_gpu() -> None:
    """The vendor's products, and two launches for the deltas of each behind one sort."""
    g, done = graph_of(dtype=torch.bfloat16, loop=False)
    on_cuda(g.mode, done.gm)
    with compile_only_gpu():
        done.run(Plan(), Lower())
    assert set(strategies(done).values()) <= {"segments", "gemv"}
    ops = done.targets()
    assert ops.count("_grouped_mm.default") == 2
    assert not any(name.startswith("triton_") and name.endswith("_.default") for name in ops)
    (output,) = next(n for n in done.gm.graph.nodes if n.op == "output").args[0]
    assert output.meta["val"].shape == (M, H)
    assert output.meta["val"].device == CUDA
