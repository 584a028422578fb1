"""Dumped graphs: a stage printed from the one before reads like one that is printed anew."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafx.capture.graph_text import GraphText, text_lines

pytestmark = pytest.mark.quick

aten = torch.ops.aten


def graph() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    built, mode = fx.Graph(), FakeTensorMode()
    nodes: dict[str, fx.Node] = {}

    def add(name: str, node: fx.Node, *sizes: int) -> Any:
        with mode:
            node.meta["val"] = torch.empty(sizes, dtype=torch.bfloat16)
        nodes[name] = node
        return node

    x = add("x", built.placeholder("x"), 4, 6)
    w = add("w", built.get_attr("weight"), 8, 6)
    right = add("right", built.call_function(aten.permute.default, (w, [1, 0])), 6, 8)
    y = add("y", built.call_function(aten.mm.default, (x, right)), 4, 8)
    halves = nodes["halves"] = built.call_function(aten.split.Tensor, (y, 4), {"dim": -1})
    left = add("left", built.call_function(operator.getitem, (halves, 0)), 4, 4)
    built.output((left, {"rest": (y,)}))
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(8, 6))
    return fx.GraphModule(root, built), nodes


def test_a_graph_reads_like_a_program() -> None:
    gm, nodes = graph()
    nodes["y"].meta["stack_trace"] = (
        '  File "model.py", line 3, in forward\n    return self.up(x)\n    ^^^^^^^\n'
    )
    nodes["y"].meta["nn_module_stack"] = {"1": ("L['self']._modules['up']", nn.Linear)}
    assert_expected_inline(
        "\n".join(text_lines(GraphText().stage(gm))),
        """\
class GraphModule(torch.nn.Module):
    def forward(
        self,
        x: "bfloat16[4, 6]",
    ):
        weight: "bfloat16[8, 6]" = self.weight
        permute_default: "bfloat16[6, 8]" = torch.ops.aten.permute.default(weight, [1, 0])
        # up (model.py:3): return self.up(x)
        mm_default: "bfloat16[4, 8]" = torch.ops.aten.mm.default(x, permute_default)
        split_tensor = torch.ops.aten.split.Tensor(mm_default, 4, dim = -1)
        getitem: "bfloat16[4, 4]" = split_tensor[0]
        return (getitem, {'rest': (mm_default,)})""",
    )


def test_what_changes_between_stages_is_printed_anew() -> None:
    gm, nodes = graph()
    text = GraphText()
    stages = [text_lines(text.stage(gm))]

    def stage() -> None:
        stages.append(text_lines(text.stage(gm)))
        assert stages[-1] == text_lines(GraphText().stage(gm))
        assert stages[-1] != stages[-2]

    nodes["y"].target = aten.matmul.default
    stage()
    nodes["halves"].kwargs = {"dim": 1}
    stage()
    with gm.graph.inserting_before(nodes["y"]):
        own = gm.graph.call_function(aten.relu.default, (nodes["x"],))
    nodes["y"].replace_input_with(nodes["x"], own)
    stage()
    nodes["y"].meta["val"] = nodes["y"].meta["val"].float()
    stage()
    nodes["y"].replace_input_with(own, nodes["x"])
    gm.graph.erase_node(own)
    stage()
    body = fx.GraphModule(nn.Module(), fx.Graph())
    body.graph.output(body.graph.placeholder("h"))
    gm.body = body
    stage()
    assert text_lines(text.stage(gm)) == stages[-1]
    kept = {id(line) for line in stages[0]} & {id(line) for line in stages[-1]}
    assert len(kept) >= 3  # the same objects: stages share what they have in common
