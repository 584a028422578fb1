"""Graphs with adapters under Inductor: deltas stay where they are in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import examine
import pytest
import tiny
import torch
from dense_merge import Case, check_mixed
from tiny_models import FAMILIES
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._inductor import memory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from lorafx.capture.lowering import InductorLowering, lowering_for
from lorafx.capture.outlined_calls import interpreted_once
from lorafx.compat import capture_settings
from lorafx.config import Options
from lorafx.errors import ConfigError
from lorafx.model.module_graph import storage_key

NAMES = ["a1", None, "a3"]


def test_no_order_by_memory_for_graphs_with_adapters(
    plain: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That order may put a delta, which is added in place, behind what reads the sum."""
    ordered: list[int] = []
    order = memory.reorder_for_peak_memory

    def noting(nodes: list[Any], *rest: Any) -> list[Any]:
        ordered.append(len(nodes))
        return order(nodes, *rest)

    monkeypatch.setattr(memory, "reorder_for_peak_memory", noting)
    torch.manual_seed(0)
    inputs = FAMILIES["plain"].inputs(len(NAMES), 4)
    cm = plain.compile(options={"lowering": "inductor", "base_graphs": True}, dynamic=False)
    with torch._inductor.config.patch(fx_graph_cache=False):
        cm(**inputs)
        assert ordered, "the base is compiled as Inductor would"
        ordered.clear()
        check_mixed(cm, plain, NAMES, inputs)
    assert not ordered


def test_a_mode_of_torch_compile_stands_for_settings_of_inductor() -> None:
    options = Options(lowering="inductor", mode="max-autotune")
    lowering = lowering_for(options, {"max_autotune_pointwise": False})
    assert isinstance(lowering, InductorLowering)
    wanted = dict(torch._inductor.list_mode_options("max-autotune"))
    assert wanted["max_autotune"]
    assert lowering.patches == {**wanted, "max_autotune_pointwise": False}
    assert lowering_for(Options(lowering="inductor")).patches == {}
    with pytest.raises(ConfigError, match=r"Options\.mode must be one of None, default, reduce"):
        Options(mode="fast")


class Body(fx.GraphModule):
    """sin(x), say; counts how often it is interpreted."""

    def __init__(self, value: torch.Tensor, operator: Any = torch.ops.aten.sin.default) -> None:
        graph = fx.Graph()
        inner = graph.call_function(operator, (graph.placeholder("x"),))
        inner.meta["val"] = value
        graph.output((inner,))
        super().__init__(nn.Module(), graph)
        self.runs = 0

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        return super().__call__(*args)


def keeps_nothing() -> FakeTensorMode:
    """As in a capture with symbolic sizes."""
    with capture_settings(8, symbolic=True):
        return FakeTensorMode(shape_env=ShapeEnv())


def test_inductor_interprets_the_body_of_equal_calls_once() -> None:
    """Torch's own rule is put back afterwards."""
    mode = keeps_nothing()
    x = mode.from_tensor(torch.ones(2, 3))
    body = Body(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        (result,) = torch.ops.higher_order.invoke_subgraph(body, "body", x)
        return result

    with mode:
        call(x)
        call(x)
        assert body.runs == 2
        with interpreted_once([x]):
            first, second = call(x), call(x)
            assert body.runs == 3
            assert (second.shape, second.stride()) == (first.shape, first.stride())
            assert storage_key(second) != storage_key(first)
            assert call(x.t().contiguous()).shape == (3, 2)
            assert call(x.double()).dtype is torch.float64
            assert call(x.t().contiguous().t()).stride() == (1, 2)
            assert body.runs == 6
        call(x)
        assert body.runs == 7


def test_a_body_that_inductor_lays_out_in_another_way_is_interpreted_again() -> None:
    mode = keeps_nothing()
    x = mode.from_tensor(torch.ones(2, 3))
    body = Body(x)
    with mode, interpreted_once([x]):
        torch.ops.higher_order.invoke_subgraph(body, "body", x)
        inner = body.graph.output_node().args[0][0]
        with body.graph.inserting_after(inner):
            turned = body.graph.call_function(torch.ops.aten.t.default, (inner,))
            turned.meta["val"] = x.t()
        body.graph.output_node().args = ((turned,),)
        body.recompile()
        (result,) = torch.ops.higher_order.invoke_subgraph(body, "body", x)
    assert result.shape == (3, 2)


def test_a_body_that_returns_a_view_of_an_operand_is_interpreted_at_each_call() -> None:
    mode = keeps_nothing()
    x, y = (mode.from_tensor(torch.ones(2, 3)) for _ in "xy")
    body = Body(x.t(), torch.ops.aten.t.default)
    with mode, interpreted_once([x, y]):
        for given in (x, y):
            (result,) = torch.ops.higher_order.invoke_subgraph(body, "body", given)
            assert storage_key(result) == storage_key(given)
    assert body.runs == 2


def test_calls_on_sizes_that_are_known_to_be_equal_are_equal() -> None:
    """Each layer's cache has a length of its own until attention makes them one."""
    mode = keeps_nothing()
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x, y, z = (
        mode.from_tensor(torch.ones(2, 3), source=ConstantSource(name), symbolic_context=context)
        for name in "xyz"
    )
    assert x.shape[0].node.expr != y.shape[0].node.expr
    assert x.shape[0] == y.shape[0]
    body = Body(x)
    with mode, interpreted_once([x, y]):
        for tensor in (x, y):
            torch.ops.higher_order.invoke_subgraph(body, "body", tensor)
        assert body.runs == 1
        torch.ops.higher_order.invoke_subgraph(body, "body", z)  # nobody compared its length
        assert body.runs == 2


@pytest.mark.slow  # a graph of 1,500 nodes
def test_the_router_of_a_large_graph(tmp_path: Path) -> None:
    """By memory its delta went to the end of the graph, where nobody read it."""
    family = next(f for f in tiny.families("causal") if f.model_type == "kimi_linear")
    report = examine.examine(family, str(tmp_path), examine.SHAPES[:1], "inductor")
    assert report["outcome"] == "ok", report
    assert report["routers"] == 1
