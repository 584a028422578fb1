"""One operator adds to the lengths of all layers' caches, and only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import TOLERANCE, build_case, error
from hand_made import hand_case
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.descriptors import (
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafx.capture import lowering
from lorafx.capture.added_lengths import add_lengths
from lorafx.kernels.ops.add_each_op import ADD_EACH

aten = torch.ops.aten
NAMES = ["a0", None, "a1"]


def test_the_lengths_of_a_static_cache_grow_by_one_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, where the cache is made and its lengths are returned too, and two steps. Masks and
    positions are computed from the first layer's length."""
    added: list[int] = []

    def noting(gm: fx.GraphModule) -> int:
        added.append(add_lengths(gm))
        return added[-1]

    monkeypatch.setattr(lowering, "add_lengths", noting)
    case = build_case("llama", tmp_path)
    cm: Any = case.compile(options={"lowering": "inductor"}, dynamic=True)
    past = transformers.StaticCache(config=cm.model.config, max_cache_len=9)
    lengths = [layer.cumulative_length for layer in past.layers]
    ids = torch.tensor([[7, 40, 12, 5, 8], [9, 9, 31, 2, 4], [60, 5, 17, 33, 33]])
    given = {"past_key_values": past, "adapter_names": NAMES}
    outputs = [cm(input_ids=ids[:, :3], **given)["logits"]]
    outputs += [cm(input_ids=ids[:, place : place + 1], **given)["logits"] for place in (3, 4)]
    assert error(torch.cat(outputs, 1), case.expected(NAMES, {"input_ids": ids})) <= TOLERANCE
    assert added == [len(past.layers)] * 2
    assert [int(length) for length in lengths] == [5] * len(past.layers)
    assert all(
        layer.cumulative_length is length
        for layer, length in zip(past.layers, lengths, strict=True)
    )


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
    cm: Any = case.compile({"lowering": "inductor"}, dynamic=False)
    lengths = [torch.tensor(2), torch.tensor(5)]
    out = cm(x=torch.randn(2, 3, 16), lengths=lengths, adapter_names=["a0", None])
    assert [*map(int, lengths)] == [5, 8]
    assert [each.tolist() for each in out["old"]] == [2, [5, 5], 2]
    assert out["old"][0].data_ptr() != out["old"][2].data_ptr()


Change = Callable[[fx.Graph, list[fx.Node], list[fx.Node]], None]


def stepped(change: Change | None = None) -> fx.GraphModule:
    """Adds 1 to the lengths of two layers, which are overwritten with that, and returns the first
    length plus x. `change` is given the graph, its inputs (x, lengths), and the sums."""
    mode = FakeTensorMode()
    with mode:
        x, length = torch.ones(3), torch.tensor(2)
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "n0", "n1")]
    for index, node in enumerate(inputs):
        node.meta.update(val=length if index else x, desc=PlainAOTInput(index))
    sums = [graph.call_function(aten.add.Tensor, (node, 1)) for node in inputs[1:]]
    for node in sums:
        node.meta["val"] = length
    result = graph.call_function(aten.add.Tensor, (inputs[0], inputs[1]))
    result.meta["val"] = x
    output = graph.output((*sums, result))
    written = [InputMutationAOTOutput(PlainAOTInput(index)) for index in (1, 2)]
    output.meta["desc"] = [*written, PlainAOTOutput(0)]
    if change is not None:
        change(graph, inputs, sums)
    return fx.GraphModule({}, graph)


def overwritten(gm: fx.GraphModule) -> list[Tensor]:
    """The lengths as AOTAutograd leaves them, and what is returned."""
    given = [torch.ones(3), torch.tensor(2), torch.tensor(5)]
    first, second, *results = gm(*given)
    given[1].copy_(first)
    given[2].copy_(second)
    return [*given[1:], *results]


def test_sums_that_overwrite_their_inputs_are_one_operator() -> None:
    gm = stepped()
    assert add_lengths(gm) == 2
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [
        aten.add.Tensor,
        ADD_EACH,
    ]
    for got, wanted in zip(overwritten(gm), overwritten(stepped()), strict=True):
        assert torch.equal(got, wanted)


def adds_numbers_apart(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    sums[1].update_arg(1, 2)


def reads_a_sum(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    """The result is of the new length, not of the old one."""
    result: Any = graph.output_node().args[0][2]  # type: ignore[index]
    result.update_arg(1, sums[0])


def returns_a_sum(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    """The caller gets a tensor of its own, which later calls must not change."""
    output = graph.output_node()
    items: Any = output.args[0]
    output.args = ((*items, sums[0]),)
    output.meta["desc"].append(PlainAOTOutput(1))


def crosses(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    """Each length is overwritten with the other one's."""
    output = graph.output_node()
    items: Any = output.args[0]
    output.args = ((items[1], items[0], items[2]),)


def adds_twice(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    """Two layers have one length, as AOTAutograd traces them; the other input stays."""
    sums[1].update_arg(0, sums[0])
    output = graph.output_node()
    items: Any = output.args[0]
    output.args = ((sums[1], inputs[2], items[2]),)


def is_no_write(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    graph.output_node().meta["desc"][1] = PlainAOTOutput(1)


def is_scaled(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    sums[0].kwargs = {"alpha": 3}


def on_another_device(graph: fx.Graph, inputs: list[fx.Node], sums: list[fx.Node]) -> None:
    with FakeTensorMode():
        elsewhere = torch.zeros((), dtype=torch.int64, device="meta")
    for node in (*inputs[1:], *sums):
        node.meta["val"] = elsewhere


@pytest.mark.parametrize(
    "change",
    [
        adds_numbers_apart,
        reads_a_sum,
        returns_a_sum,
        crosses,
        adds_twice,
        is_no_write,
        is_scaled,
        on_another_device,
    ],
)
def test_sums_stay_where_somebody_may_see(change: Change) -> None:
    gm = stepped(change)
    assert add_lengths(gm) == 0
    for got, wanted in zip(overwritten(gm), overwritten(stepped(change)), strict=True):
        assert torch.equal(got, wanted)
