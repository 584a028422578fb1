"""plan and lower where a kernel computes a linear's input: what is chosen, what it becomes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compile_only_gpu import compile_only_gpu, on_cuda
from site_graphs import Finished, SiteGraph
from torch import fx, nn

from lorafx.errors import ConfigError
from lorafx.kernels.cost import vendor_cost
from lorafx.passes.fuse.fuse import Fuse
from lorafx.passes.lower.lower import Lower
from lorafx.passes.match.match import Match
from lorafx.passes.plan.plan import Plan

aten = torch.ops.aten
K, N, B, T = 32, 48, 3, 2
ROWS = [0, -1, 2]
KERNEL_CALL = torch.ops.higher_order.triton_kernel_wrapper_functional
PINS = {"up": "deferred", "down": "prologue"}


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)


def mlp(
    *,
    read_twice: bool = False,
    tokens: int = T,
    hidden: int = K,
    inner: int = N,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[SiteGraph, Finished]:
    """down(relu(up(x))), whose up may be read by somebody else too."""
    torch.manual_seed(0)
    rows = tokens if rows is None else rows
    g = SiteGraph(Mlp(hidden, inner).to(dtype), ROWS, lowering="triton", targets=["up", "down"])
    x = g.argument(torch.randn(B, tokens, hidden, dtype=dtype))
    for path in ("up", "down"):
        g.declare(path)
    y = g.call(aten.linear.default, x, g.weight("up"), g.weight("up", "bias"))
    y = g.mark("up", x, y, rows=rows)
    h = g.call(aten.relu.default, y)
    z = g.call(aten.linear.default, h, g.weight("down"), g.weight("down", "bias"))
    z = g.mark("down", h, z, rows=rows)
    if read_twice:
        z = g.call(aten.add.Tensor, z, g.call(aten.sum.dim_IntList, y, [-1], True))
    return g, g.output(z)


def planned(done: Finished, pins: dict[str, str]) -> dict[str, str]:
    """The strategy of each site, by its path."""
    done.run(Match(), Fuse())
    done.ctx.program.options = replace(done.ctx.program.options, plan=pins)
    done.run(Plan())
    return {
        state.site.path: state.strategy.split(" ")[0]
        for states in done.ctx.states.values()
        for state in states
    }


def kernels(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is KERNEL_CALL]


def test_only_kernels_and_the_vendors_products_are_left() -> None:
    g, done = mlp()
    done.run(Match(), Fuse())
    on_cuda(g.mode, done.gm)
    done.ctx.program.options = replace(done.ctx.program.options, plan=PINS)
    with compile_only_gpu():
        assert done.run(Plan(), Lower()) == 2
    done.gm.graph.eliminate_dead_code()
    for node in done.gm.graph.nodes:
        if node.op == "call_function":
            assert getattr(node.target, "namespace", "") != "lorafx", node.format_node()
    assert len(kernels(done.gm)) == 3  # shrink; relu and shrink; expand
    assert done.targets().count("addmm.default") == 2
    assert "relu.default" not in done.targets()
    (output,) = next(n for n in done.gm.graph.nodes if n.op == "output").args[0]
    assert output.meta["val"].shape == (B, T, K)


def test_a_delta_is_deferred_only_where_nobody_else_reads_it() -> None:
    _, done = mlp(read_twice=True)
    assert planned(done, {"down": "prologue", "up": "segments"}) == {
        "up": "segments",
        "down": "prologue",
    }
    _, done = mlp(read_twice=True)
    with pytest.raises(ConfigError, match=r"pins 'deferred' for up"):
        planned(done, PINS)


def test_a_pin_elsewhere_is_not_overruled() -> None:
    _, done = mlp()
    assert planned(done, {"up": "epilogue", "down": "prologue"})["up"] == "epilogue"


def test_many_rows_take_it_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan leaves both products to the vendor and kernels reach the memory's speed; few
    rows do not."""
    monkeypatch.setattr(vendor_cost, "OVER_ROOFLINE", 1.0)
    _, done = mlp(tokens=1024, hidden=1024, inner=2048)
    assert planned(done, {}) == PINS
    _, done = mlp()
    assert "prologue" not in planned(done, {}).values()


def test_what_no_kernel_serves_is_left_to_aten() -> None:
    """Rows whose owners nobody proved, which only aten can refuse in a mixed batch; float64."""
    _, done = mlp(rows=0)
    assert planned(done, {"down": "prologue"}) == {"up": "aten", "down": "aten"}
    _, done = mlp(dtype=torch.float64)
    assert planned(done, {"down": "prologue"}) == {"up": "aten", "down": "aten"}
