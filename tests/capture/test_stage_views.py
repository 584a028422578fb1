"""What is kept of each stage for the viewer: the graph's own nodes, sites, sources, costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case
from tiny_models import FAMILIES
from torch import fx, nn
from viewed_graphs import page_data, stage_nodes

import lorafx
from lorafx.capture.record import GraphRecord
from lorafx.viewer.stages import NodeView

FEED = FAMILIES["llama"].inputs


@pytest.fixture(scope="module")
def cm(llama: Case) -> Any:
    """A Llama of two layers, which `outline` makes calls of one body; a base graph beside it."""
    compiled = llama.compile()
    for rows in (["a0", None], [None, None]):
        compiled(**FEED(len(rows), 4), adapter_names=rows)
    return compiled


@pytest.fixture(scope="module")
def record(cm: Any) -> GraphRecord:
    return cm._session.backend.records[0]


def by_name(record: GraphRecord, stage: str) -> dict[str, NodeView]:
    (found,) = (item for item in record.view.stages if item.name == stage)
    return {node.name: node for _, nodes in found.graphs for node in nodes}


def test_each_stage_has_the_lines_of_its_text(record: GraphRecord) -> None:
    stages = record.view.stages
    assert [view.name for view in stages] == [name for name, _, _ in record.dump.stages]
    for view, (_, _, text) in zip(stages, record.dump.stages, strict=True):
        lines = {line.strip() for line in text.splitlines()}
        for _, nodes in view.graphs:
            assert {node.line.strip() for node in nodes if node.op != "placeholder"} <= lines
            known = {node.name for node in nodes}
            assert all(known.issuperset(node.inputs) for node in nodes)
    for report in record.passes:
        (view,) = (item for item in stages if item.name == report.name)
        assert len(view.graphs[0][1]) == report.nodes
        assert (view.edits, view.seconds) == (report.edits, report.seconds)


def test_stages_share_what_a_pass_leaves_alone(record: GraphRecord) -> None:
    stages = record.view.stages
    assert len({id(n) for stage in stages for _, nodes in stage.graphs for n in nodes}) < (
        0.3 * sum(stage.nodes for stage in stages)
    )


def test_sites_are_at_their_nodes_in_every_stage(cm: Any, record: GraphRecord) -> None:
    served = {state.site.path for state in record.states}
    for stage in record.view.stages[2:]:
        assert {site.path for sites in stage.sites.values() for site in sites} == served
        nodes = {node for _, nodes in stage.graphs for node in nodes}
        assert nodes.issuperset(stage.sites)
    (pack,) = (stage for stage in record.view.stages if stage.name == "pack")
    packed = [sites for sites in pack.sites.values() if len(sites) > 1]
    assert packed
    assert {site.form for sites in packed for site in sites} == {"packed"}
    last = record.view.stages[-1]
    assert all(site.strategy and site.rows for sites in last.sites.values() for site in sites)


def test_outlined_layers_are_called_by_path(record: GraphRecord) -> None:
    last = record.view.stages[-1]
    assert len(last.graphs) == 2
    calls = [node for node in last.graphs[0][1] if "invoke_subgraph" in node.target]
    assert [node.path for node in calls] == ["model.layers.0", "model.layers.1"]
    for node in calls:
        assert {site.path.startswith(node.path) for site in last.sites[node]} == {True}
    inside = [node for node in last.graphs[1][1] if node in last.sites]
    assert all(len(last.sites[node]) >= 2 for node in inside)  # of both layers


def test_a_node_knows_its_module_source_and_cost(record: GraphRecord) -> None:
    nodes = by_name(record, "captured").values()
    made = [node for node in nodes if node.op == "call_function" and node.path]
    assert made
    assert sum(bool(node.source) for node in made) > 0.9 * len(made)
    assert all(
        node.source.startswith("transformers/") and node.code for node in made if node.source
    )
    (gate,) = {node.code for node in made if node.path == "model.layers.0.mlp.gate_proj"}
    assert "self.gate_proj(x)" in gate
    products = [node for node in nodes if node.target == "torch.ops.aten.mm.default"]
    assert products
    sizes = {node.name: node.sizes for node in nodes}
    for node in products:
        (m, k), (_, n) = (sizes[name] for name in node.inputs)
        assert node.flops == 2 * m * n * k
        assert node.itemsize == 4
    classes = {node.path.rpartition(".")[2]: node.cls for node in made}
    assert classes["q_proj"] == "Linear"
    assert {node.kind for node in nodes if node.op == "placeholder"} >= {"weight", "slots"}


class OddUse(nn.Module):
    """Its second linear is used in a way that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.odd = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.odd(h) + self.odd.weight.sin().sum()


def test_refusals_are_there_from_the_pass_that_makes_them(small: Callable[..., Case]) -> None:
    cm = small(OddUse, ["up", "odd"], ["up"]).compile(dynamic=False)
    cm(torch.randn(2, 6), adapter_names=["b", None])
    record = cm._session.backend.records[0]
    captured, *others = record.view.stages
    assert not captured.refusals
    (refusal,) = {item for stage in others for item in stage.refusals}
    assert refusal == (("odd",), "always", record.refusals[0].reason)
    made = [node for _, nodes in others[-1].graphs for node in nodes if node.path == "odd"]
    assert any("addmm" in node.target for node in made)  # what the viewer shows in red


def test_the_dump_of_a_model_has_a_page(cm: Any, tmp_path: Path) -> None:
    cm.dump(tmp_path)
    about, graphs = page_data(tmp_path / "index.html")
    records = cm._session.backend.records
    assert about["model"] == "LlamaForCausalLM"
    assert about["texts"] == {"explain.txt": (tmp_path / "explain.txt").read_text()}
    assert [graph["title"] for graph in graphs] == [record.title for record in records]
    for graph, record in zip(graphs, records, strict=True):
        assert graph["seconds"] == pytest.approx(record.seconds)
        for index, stage in enumerate(record.view.stages):
            for (_, found), (_, nodes) in zip(stage_nodes(graph, index), stage.graphs, strict=True):
                assert [node[0] for node in found] == [node.name for node in nodes]
        assert (tmp_path / record.title.replace(" ", "-") / "last.dot").exists()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    of_first = {event["name"]: event for event in events if event["tid"] == 1 and "ts" in event}
    start, end = (of_first["passes"]["ts"], of_first["passes"]["ts"] + of_first["passes"]["dur"])
    for report in records[0].passes:
        event = of_first[report.name]
        assert start <= event["ts"] + 1
        assert event["ts"] + event["dur"] <= end + 1


@pytest.mark.parametrize("family", ["plain", "vit"])
def test_a_page_is_written_as_graphs_come(
    case_of: Callable[..., Case], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path))
    cm, feed = case_of(family).compile(dynamic=False), FAMILIES[family].inputs
    cm(**feed(2, 4), adapter_names=["a0", None])
    assert len(page_data(tmp_path / "index.html")[1]) == 1
    cm(**feed(2, 4), adapter_names=[None, None])
    about, graphs = page_data(tmp_path / "index.html")
    assert [graph["title"] for graph in graphs] == ["graph 0 lora", "graph 1 base"]
    assert about["texts"] == {"explain.txt": (tmp_path / "explain.txt").read_text()}
    assert graphs[0]["sources"].keys() == cm._session.backend.records[0].dump.sources.keys()
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "later"))
    cm(**feed(1, 4), adapter_names=["a1"])
    _, (later,) = page_data(tmp_path / "later" / "index.html")
    assert later["title"] == "graph 2 lora"


def test_a_pass_that_fails_leaves_the_stages_before_it(plain: Case, tmp_path: Path) -> None:
    def broken(gm: fx.GraphModule, ctx: Any) -> int:
        raise RuntimeError("this pass is wrong")

    passes = {"broken": lorafx.After("match", broken)}
    cm = plain.compile({"passes": passes, "dump": str(tmp_path)}, dynamic=False)
    with pytest.raises(lorafx.LorafxError, match="this pass is wrong"):
        cm(**FAMILIES["plain"].inputs(2, 4), adapter_names=["a0", None])
    _, (graph, *_) = page_data(tmp_path / "index.html")
    assert [stage["name"] for stage in graph["stages"]] == ["captured", "write_in_place", "match"]
