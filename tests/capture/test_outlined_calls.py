"""Calls of outlined layers: what each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import build_case
from torch import fx

from lorafx.capture.lowering import ReferenceLowering
from lorafx.passes.outline.outline import INVOKE

IDS = torch.tensor([[7, 40, 12], [9, 9, 31], [60, 5, 17]])


def test_layers_with_a_cache_take_each_length_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all layers' keys are one symbol by then, and each is an input of the graph."""
    taken: list[list[int]] = []
    compile_graph = ReferenceLowering.compile

    def noting(self: ReferenceLowering, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        calls = gm.graph.find_nodes(op="call_function", target=INVOKE)
        taken.append([len(call.args) for call in calls])
        return compile_graph(self, gm, inputs)

    monkeypatch.setattr(ReferenceLowering, "compile", noting)
    for layers in (2, 3):
        case = build_case("llama", tmp_path / str(layers), num_hidden_layers=layers)
        cm: Any = case.compile()
        past = cm(input_ids=IDS, use_cache=True, adapter_names=["a0", None, "a1"]).past_key_values
        cm(input_ids=IDS[:, :1], past_key_values=past, adapter_names=["a0", None, "a1"])
    two, three = taken[1], taken[3]
    assert two == [two[0]] * 2
    assert three == [two[0]] * 3
