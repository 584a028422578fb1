"""Calls of outlined layers: what each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import build_case
from torch import fx

from lorafx.capture.lowering import ReferenceLowering
from lorafx.passes.outline.outline import INVOKE
from lorafx.passes.outline.regions import bodies

IDS = torch.tensor([[7, 40, 12], [9, 9, 31], [60, 5, 17]])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_layers_with_a_cache_take_each_length_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Those of all layers' keys are one symbol by then, and each is an input of the graph. Inductor
    knows an input as the symbol that it was, and computes with the one that it has become."""
    taken: list[list[int]] = []
    compile_graph = ReferenceLowering.compile

    def noting(self: ReferenceLowering, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        calls = gm.graph.find_nodes(op="call_function", target=INVOKE)
        taken.append([len(call.args) for call in calls])
        for _, body in bodies(gm):
            known, read = set(), set()
            for node in body.graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, torch.SymInt):
                    known.add(value.node._expr)
                elif isinstance(value, torch.Tensor):
                    sizes = (*value.shape, *value.stride())
                    exprs = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
                    read.update(symbol for expr in exprs for symbol in expr.free_symbols)
            assert read
            assert read <= known
        return compile_graph(self, gm, inputs)

    monkeypatch.setattr(ReferenceLowering, "compile", noting)
    for layers in (2, 3):
        case = build_case("llama", tmp_path / str(layers), num_hidden_layers=layers)
        cm: Any = case.compile()
        past: Any = transformers.DynamicCache(config=cm.model.config)
        if kind == "static":
            past = transformers.StaticCache(config=cm.model.config, max_cache_len=8)
        for part in (IDS, IDS[:, :1]):
            cm(input_ids=part, past_key_values=past, adapter_names=["a0", None, "a1"])
    two, three = taken[1], taken[3]
    assert two == [two[0]] * 2
    assert three == [two[0]] * 3
