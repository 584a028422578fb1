"""The way of a call, from `forward` to the graph that serves it, function by function."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.capture import executable

K = 16
TO_DYNAMO = (
    "CompiledModel.forward Session.call Entry.__call__ Session.run Entry._serve "
    "Tiers._by_ready_graph Entry.run_graph"
)
BASE = f"{TO_DYNAMO} checked.run with_lookups.run"
#: Operators between graphs are followed, and those of the graph are not.
WITH_ADAPTERS = (
    f"{TO_DYNAMO} Following.run Following._pushed Entry.run_graph.<lambda> checked.run unfollowed "
    "checked._run with_lookups.run"
)
MIXED = ["a", None, "b"]


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


@pytest.fixture
def ready(small: Any) -> Any:
    """A model whose calls would be answered eagerly, if there were no graph."""
    case = small(OneLinear, ["w"])
    options = {**REFERENCE, "start": "eager", "cache": None, "base_graphs": False}
    cm = lorafx.compile(case.model(), case.folders, options=options)
    cm._session.compile_for(lambda: cm(x=torch.randn(3, K), adapter_names=MIXED))
    return cm


@pytest.mark.parametrize(("names", "hops"), [(None, BASE), (MIXED, WITH_ADAPTERS)])
def test_hops(ready: Any, monkeypatch: pytest.MonkeyPatch, names: Any, hops: str) -> None:
    stack: list[str] = []
    added_inputs = executable._added_inputs

    def noting(*args: Any) -> Any:
        frames = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
        ours = [f.f_code for f in frames if str(f.f_globals.get("__name__")).startswith("lorafx.")]
        stack[:] = [code.co_qualname.replace(".<locals>", "") for code in reversed(ours)]
        return added_inputs(*args)

    monkeypatch.setattr(executable, "_added_inputs", noting)
    for _ in range(2):  # before the first call of a kind, nothing is known of it
        ready.forward(x=torch.randn(3, K), adapter_names=names)
    assert " ".join(stack) == hops
    assert len(BASE.split()) == 9


def test_a_call_that_does_not_fit_is_the_models_error(ready: Any) -> None:
    """Dynamo's wrapper raises it if there is a graph, and it is not about another torch."""
    for names in (None, MIXED):
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            ready(x=torch.randn(3, K), adapter_names=names, other=1)
