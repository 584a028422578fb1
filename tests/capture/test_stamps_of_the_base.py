"""Graphs of calls without adapters are traced one layer of several too, and are what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, error
from stacks import LAYERS, H, stack
from torch import fx
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from lorafx.capture import lowering
from lorafx.capture.stamps import Folded, NotUnfolded, unfold

NAMES = [None] * 3


@pytest.mark.slow
def test_inductor_writes_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stamps, without, and where the layers cannot be put back in their places."""
    case = stack(tmp_path)
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
