"""join on graphs built by hand, and in a compiled model that serves few rows and many."""

from __future__ import annotations

import pytest
import torch
from dense_merge import check_mixed, error
from site_graphs import SiteGraph
from tiny_models import FAMILIES
from toolchain import needs_compiler
from torch import fx, nn

from lorafx.passes.fuse.fuse import Fuse
from lorafx.passes.lower.lower import Lower
from lorafx.passes.match.match import Match
from lorafx.passes.plan import Plan
from lorafx.passes.products import Join, Products

pytestmark = needs_compiler

aten = torch.ops.aten
K, N, B, T = 4, 6, 3, 2
FIRST = (Match(), Fuse(), Plan(), Lower())


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.with_bias = nn.Linear(K, N)
        self.without = nn.Linear(K, N, bias=False)


def start(path: str, x: torch.Tensor) -> tuple[SiteGraph, fx.Node, fx.Node]:
    """(graph, x, what the linear gives)"""
    torch.manual_seed(0)
    targets = ["with_bias", "without"]
    g = SiteGraph(Linears(), [0, -1, 2], lowering="inductor", targets=targets)
    node = g.argument(x)
    bias = path == "with_bias"
    g.declare(path, bias=bias)
    own = [g.weight(path, "bias")] if bias else []
    return g, node, g.call(aten.linear.default, node, g.weight(path), *own)


@pytest.mark.parametrize("path", ["with_bias", "without"])
def test_a_product_and_its_delta(path: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(B, T, K)
    g, node, y = start(path, x)
    done = g.output(g.mark(path, node, y, rows=T))
    want = g.merged(path, x)
    done.run(*FIRST, Products())
    assert done.run(Join()) == 1
    names = [name.partition(".")[0] for name in done.targets()]
    op = "dense_addmm_delta" if path == "with_bias" else "dense_mm_delta"
    assert [name for name in names if "mm" in name or "auto" in name] == [op]
    assert error(done.result()[0], want) <= 1e-5
    (states,) = done.ctx.states.values()
    assert [state.site.path for state in states] == [path]


def test_a_product_that_somebody_else_reads() -> None:
    x = torch.randn(B, T, K)
    g, node, y = start("without", x)
    done = g.output(g.mark("without", node, y, rows=T), y)
    want = done.result()
    done.run(*FIRST, Products())
    assert done.run(Join()) == 0
    for got, expected in zip(done.result(), want, strict=True):
        assert error(got, expected) <= 1e-5


def test_a_product_that_stays_with_aten() -> None:
    g, node, y = start("without", torch.randn(B, T, K))
    done = g.output(g.mark("without", node, y, rows=T))
    done.run(*FIRST)
    assert done.run(Join()) == 0


@pytest.mark.slow
def test_a_batch_that_grows_and_shrinks(plain) -> None:
    """One graph for few rows and many, with rows of the base, and the bits of two ops."""
    torch.manual_seed(0)
    together, apart = (
        plain.compile(options={"lowering": "inductor", "passes": {"join": joined}})
        for joined in (True, False)
    )
    family = FAMILIES["plain"]
    check_mixed(together, plain, ["a0", None, "a1"], family.inputs(3, 5))
    compiled = together.recompiles
    for rows, length in ((2, 3), (9, 7), (16, 9), (4, 16)):  # 6 to 144 rows
        names = [(None, "a0", "a1")[row % 3] for row in range(rows)]
        inputs = family.inputs(rows, length)
        check_mixed(together, plain, names, inputs)
        got, want = (cm(**inputs, adapter_names=names)["logits"] for cm in (together, apart))
        assert torch.equal(got, want)
    assert together.recompiles == compiled
    passes = together._session.backend.records[0].passes
    assert next(report.edits for report in passes if report.name == "join") > 0
    reports = apart._session.backend.records[0].passes
    assert not any(report.name == "join" for report in reports)
