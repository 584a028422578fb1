"""The op that hands what a stamp gives to the tensor that its layer writes into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

pytestmark = pytest.mark.quick

OVERWRITE = torch.ops.lorafx.overwrite.default


def test_opcheck() -> None:
    opcheck(OVERWRITE, (torch.zeros(3, 4), torch.randn(3, 4)))
    opcheck(OVERWRITE, (torch.zeros(3, 4)[:, 1:3], torch.randn(3, 2)))


def test_what_is_overwritten_is_the_value() -> None:
    """Nothing is copied in the traced graph; a view of an input is written into as well."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    def run(x: Tensor, table: Tensor, y: Tensor) -> Tensor:
        OVERWRITE(x, y.sin())
        OVERWRITE(table[1], y)
        return x + table[1]

    x, table, y = torch.zeros(4), torch.zeros(2, 4), torch.randn(4)
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        result = compiled(x, table, y)
    assert torch.equal(x, y.sin())
    assert torch.equal(table, torch.stack([torch.zeros(4), y]))
    assert torch.equal(result, y.sin() + y)
    targets = {node.target for node in graphs[0].graph.nodes}
    assert OVERWRITE not in targets
    assert torch.ops.aten.copy.default not in targets
