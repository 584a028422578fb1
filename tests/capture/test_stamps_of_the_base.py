"""Graphs of calls without adapters are traced one layer of several too, and are what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, error
from hand_made import hand_case
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from lorafx.capture import lowering
from lorafx.capture.stamps import Folded, NotUnfolded, unfold

H, LAYERS, NAMES = 6, 3, [None] * 3


class Block(nn.Module):
    """h + down(tanh(up(norm(h)))) / 2 + |sin(h)|."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(self.norm(h)))).mul(0.5) + h.sin().abs()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


def test_inductor_writes_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stamps, without, and where the layers cannot be put back in their places."""
    torch.manual_seed(0)
    base = Stack().eval().requires_grad_(False)
    case = hand_case(base, tmp_path, a0=["layers.0.up"])
    folds: list[Folded] = []

    def works(graph: fx.Graph, folded: Folded) -> None:
        folds.append(folded)
        unfold(graph, folded)

    def fails(graph: fx.Graph, folded: Folded) -> None:
        folds.append(folded)
        raise NotUnfolded("as in a torch that traces otherwise")

    inputs = {"x": torch.randn(len(NAMES), 5, H)}
    codes, results = set(), []
    own = {"lowering": "inductor", "base_graphs": True}
    for stamps, unfolds in ((False, fails), (True, works), (True, fails)):
        monkeypatch.setattr(lowering, "unfold", unfolds)
        cm: Any = case.compile({**own, "shortcuts": ["stamps"] if stamps else []}, dynamic=False)
        # Each is lowered anew; what a compiler made of equal C++ may be taken from before.
        with config.patch(fx_graph_cache=False):
            result, (code,) = run_and_get_code(cm, **inputs, adapter_names=NAMES)
        codes.add("".join(line.partition("#")[0] for line in code.splitlines()))
        results.append(result["logits"])
    assert [[1 + len(kind.others) for kind in each.kinds] for each in folds] == [[LAYERS]] * 2
    assert len(codes) == 1
    assert all(torch.equal(results[0], other) for other in results)
    assert error(results[0], case.expected(NAMES, inputs)) <= TOLERANCE
