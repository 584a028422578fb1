"""What reads calls reads them by name: arguments given by name are those given by position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ownership_graphs import by_keyword
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.program.weight_uses import expert_uses, uses_of

pytestmark = pytest.mark.quick

aten = torch.ops.aten
M, N, K, E = 3, 6, 4, 2
BIAS, IDS, ENDS = torch.randn(N), torch.tensor([0, 1, 1]), torch.tensor([1, 3], dtype=torch.int32)


def traced(function: Callable[..., object], *inputs: Tensor) -> tuple[fx.Graph, fx.Node]:
    """The graph of `function`, and its last input."""
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs).graph
    return graph, list(graph.find_nodes(op="placeholder"))[-1]


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, w: x @ w.t(), "linear"),
        (lambda x, w: torch.addmm(BIAS, x, w.permute(1, 0)), "linear"),
        (lambda x, w: torch.addmm(BIAS, x, w.t(), beta=2), "unknown"),
        (lambda x, w: x @ w.to(torch.float64).float().transpose(-2, -1), "linear"),
        (lambda x, w: torch.baddbmm(BIAS, x[None], w.t().expand(1, K, N)), "linear"),
        (lambda x, w: x @ w.split(2)[1].t(), "blocks"),
        (lambda x, w: torch.bmm(x.expand(2, M, K), w.view(2, 3, K).transpose(1, 2)), "blocks"),
        (lambda x, w: F.embedding(IDS, w), "embedding"),
        (lambda x, w: w * x[0], "unknown"),
    ],
)
def test_uses_of_a_weight(function: Callable[..., Tensor], kind: str) -> None:
    graph, weight = traced(function, torch.randn(M, K), torch.randn(N, K))
    found = uses_of(weight, transposed=False)
    assert {use.kind for use in found} == {kind}
    by_keyword(graph)
    assert uses_of(weight, transposed=False) == found


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, w: GROUPED_MM(x, w.transpose(1, 2), ENDS), "sorted"),
        (lambda x, w: aten._grouped_mm(x, w.permute(0, 2, 1), ENDS), "sorted"),
        (lambda x, w: torch.bmm(x[:, None], w[IDS].transpose(1, 2)), "chosen"),
        (lambda x, w: torch.bmm(w[IDS], x[:, :, None]), "chosen"),
        (lambda x, w: torch.bmm(x.expand(E, M, 16), w.transpose(1, 2)), "all"),
    ],
)
def test_uses_of_experts(function: Callable[..., Tensor], kind: str) -> None:
    x, w = torch.randn(M, 16).bfloat16(), torch.randn(E, N, 16).bfloat16()
    graph, weight = traced(function, x, w)
    found = expert_uses(weight, transposed=False)
    assert [use.kind for use in found] == [kind]
    by_keyword(graph)
    assert expert_uses(weight, transposed=False) == found
