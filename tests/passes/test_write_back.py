"""Outlined layers write into a cache of a fixed size themselves, and only where nobody can tell."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hand_made import hand_case
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTInput
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafx.config import Options
from lorafx.passes.write_back import WriteBack
from lorafx.program.bodies import INVOKE

aten = torch.ops.aten


Change = Callable[[fx.Graph, list[fx.Node], list[fx.Node]], None]


def stepped(change: Change | None = None) -> fx.GraphModule:
    """Two calls of a body that adds x to a row of its cache, and returns the cache and its sum.
    `change` is given the graph, its inputs (x, caches), and the updated caches."""
    mode = FakeTensorMode()
    with mode:
        x, cache = torch.ones(3), torch.zeros(2, 3)
    inner = fx.Graph()
    operands = [inner.placeholder(name) for name in "xc"]
    place = inner.call_function(aten.select_scatter.default, (operands[1], operands[0], 0, 1))
    total = inner.call_function(aten.sum.dim_IntList, (place, [0]))
    for node, value in zip((*operands, place, total), (x, cache, cache, x), strict=True):
        node.meta["val"] = value
    inner.output((place, total))
    root = torch.nn.Module()
    root.body = fx.GraphModule({}, inner)
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "c0", "c1")]
    for index, (node, value) in enumerate(zip(inputs, (x, cache, cache), strict=True)):
        node.meta.update(val=value, desc=PlainAOTInput(index))
    body = graph.get_attr("body")
    caches, last = [], inputs[0]
    for given in inputs[1:]:
        call = graph.call_function(INVOKE, (body, "body", last, given))
        call.meta["val"] = (cache, x)
        caches.append(graph.call_function(operator.getitem, (call, 0)))
        caches[-1].meta["val"] = cache
        last = graph.call_function(operator.getitem, (call, 1))
        last.meta["val"] = x
    output = graph.output((*caches, last))
    output.meta["desc"] = [
        *(InputMutationAOTOutput(PlainAOTInput(index)) for index in (1, 2)),
        None,
    ]
    if change is not None:
        change(graph, inputs, caches)
    return fx.GraphModule(root, graph)


def values() -> list[Tensor]:
    return [torch.tensor([1.0, 2.0, 3.0]), torch.ones(2, 3), torch.full((2, 3), 2.0)]


def write_back(gm: fx.GraphModule, **options: Any) -> int:
    ctx: Any = SimpleNamespace(program=SimpleNamespace(options=Options(**options)))
    edits = WriteBack().run(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    return edits


def overwritten(gm: fx.GraphModule) -> list[Tensor]:
    """The caches as AOTAutograd leaves them, and the result."""
    given = values()
    *updated, result = gm(*given)
    for place, value in zip(given[1:], updated, strict=True):
        place.copy_(value)
    return [*given[1:], result]


def test_bodies_write_what_would_be_copied_back() -> None:
    gm = stepped()
    want = overwritten(stepped())
    assert write_back(gm, lowering="inductor") == 2
    given = values()
    first, second, result = gm(*given)
    assert (first is given[1], second is given[2]) == (True, True)
    for got, wanted in zip((first, second, result), want, strict=True):
        assert torch.equal(got, wanted)
    calls = gm.graph.find_nodes(op="call_function", target=INVOKE)
    assert [len(call.meta["val"]) for call in calls] == [1, 1]


def reads_an_input(graph: fx.Graph, inputs: list[fx.Node], caches: list[fx.Node]) -> None:
    """The first layer's cache as it was before is a result too."""
    output = graph.output_node()
    with graph.inserting_before(output):
        old = graph.call_function(aten.sum.dim_IntList, (inputs[1], [0]))
    output.update_arg(0, (*caches, old))


def reads_a_result(graph: fx.Graph, inputs: list[fx.Node], caches: list[fx.Node]) -> None:
    """The first layer's cache is read behind it, where the order of both is not told."""
    output = graph.output_node()
    with graph.inserting_before(output):
        new = graph.call_function(aten.sum.dim_IntList, (caches[0], [0]))
    output.update_arg(0, (*caches, new))


def is_no_write(graph: fx.Graph, inputs: list[fx.Node], caches: list[fx.Node]) -> None:
    """The second layer's cache is returned, and the input stays."""
    graph.output_node().meta["desc"][1] = None


@pytest.mark.parametrize("change", [reads_an_input, reads_a_result, is_no_write])
def test_nothing_is_written_that_somebody_may_see(change: Change) -> None:
    gm = stepped(change)
    want = overwritten(stepped(change))
    assert write_back(gm, lowering="inductor") == 0
    for got, wanted in zip(overwritten(gm), want, strict=True):
        assert torch.equal(got, wanted)


class ReturnsOld(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor, lengths: list[Tensor]) -> dict[str, Any]:
        zero = torch.zeros((), dtype=torch.int64)
        old = [lengths[0].clone(), (lengths[1] + 0).expand(2), lengths[0] + zero]
        for length in lengths:
            length += x.shape[1]
        return {"logits": self.up(x), "old": old}


def test_lengths_from_before_are_returned_as_they_were(tmp_path: Path) -> None:
    case = hand_case(ReturnsOld(), tmp_path, a0=["up"])
    cm: Any = case.compile({"lowering": "inductor"})
    lengths = [torch.tensor(2), torch.tensor(5)]
    out = cm(x=torch.randn(2, 3, 16), lengths=lengths, adapter_names=["a0", None])
    assert [*map(int, lengths)] == [5, 8]
    assert [each.tolist() for each in out["old"]] == [2, [5, 5], 2]
    assert out["old"][0].data_ptr() != out["old"][2].data_ptr()
