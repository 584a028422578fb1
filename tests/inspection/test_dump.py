"""What a dump has of each stage: the graph's own nodes, sites, sources, refusals; and which
graphs can be dumped afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case
from tiny_models import FAMILIES
from torch import nn
from viewed_graphs import page_data

from lorafx import ConfigError, LorafxWarning, UnknownAdapterError

pytestmark = pytest.mark.any_sizes

FEED = FAMILIES["llama"].inputs

Nodes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def dumped(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Llama of two layers, which `outline` makes calls of one body; a base graph beside it."""
    folder = tmp_path_factory.mktemp("dump")
    cm = llama.compile({"dump": str(folder)}, dynamic=False)
    for rows in (["a0", None], [None, None]):
        cm(**FEED(len(rows), 4), adapter_names=rows)
    return cm, folder


@pytest.fixture(scope="module")
def graph(dumped: tuple[Any, Path]) -> dict[str, Any]:
    """What the page has of the first graph."""
    return page_data(dumped[1] / "index.html")[1][0]


def nodes_of(graph: dict[str, Any], stage: dict[str, Any], part: int = 0) -> Nodes:
    nodes = [graph["nodes"][number] for number, body, *_ in stage["nodes"] if body == part]
    return {node["name"]: node for node in nodes}


def served(graph: dict[str, Any], stage: dict[str, Any]) -> list[list[dict[str, str]]]:
    """Of each node with sites the facts of these."""
    found = (graph["nodes"][number]["sites"] for number, *_ in stage["nodes"])
    return [list(map(dict, sites)) for sites in found if sites]


def test_each_stage_has_the_lines_of_its_text(
    dumped: tuple[Any, Path], graph: dict[str, Any]
) -> None:
    record = dumped[0]._session.backend.records[0]
    passes = {report.name: report for report in record.passes}
    names = [stage["name"] for stage in graph["stages"]]
    assert [name for name in names if name not in passes] == ["traced", "captured"]
    # What `unfold` leaves is the captured graph.
    assert [name for name in names if name in passes] == [n for n in passes if n != "unfold"]
    assert names.index("captured") == names.index("look_up_slots") - 1
    for index, stage in enumerate(graph["stages"]):
        text = (dumped[1] / "graph-0-lora" / f"{index:02d}-{stage['name']}.py").read_text()
        for part in range(len(stage["bodies"])):
            nodes = nodes_of(graph, stage, part)
            assert all(node["line"] in text for node in nodes.values())
            assert all(nodes.keys() >= set(node["inputs"]) for node in nodes.values())
        if stage["name"] in passes:
            report = passes[stage["name"]]
            assert len(nodes_of(graph, stage)) == report.nodes
            assert stage["did"].startswith(f"{report.edits} edits")
    # Nodes that a pass leaves alone are written once.
    numbers = [n for stage in graph["stages"] for n, *_ in stage["nodes"]]
    assert len(graph["nodes"]) == len(set(numbers)) < 0.3 * len(numbers)


def test_sites_are_at_their_nodes_in_every_stage(
    dumped: tuple[Any, Path], graph: dict[str, Any]
) -> None:
    states = dumped[0]._session.backend.records[0].states
    names = [stage["name"] for stage in graph["stages"]]
    for stage in graph["stages"][names.index("match") :]:
        paths = {site["Site"] for sites in served(graph, stage) for site in sites}
        assert paths == {state.site.path for state in states}
    (pack,) = (stage for stage in graph["stages"] if stage["name"] == "pack")
    packed = [sites for sites in served(graph, pack) if len(sites) > 1]
    assert {site["Form"] for sites in packed for site in sites} == {"packed"}
    last = served(graph, graph["stages"][-1])
    assert all(site["Strategy"] and site["Row map"] for sites in last for site in sites)


def test_a_node_knows_its_module_and_source(graph: dict[str, Any]) -> None:
    nodes = nodes_of(graph, graph["stages"][0])
    made = [node for node in nodes.values() if node["op"] == "call_function" and node["path"]]
    facts = [dict(node["facts"]) for node in made]
    sources = [fact["Source"] for fact in facts if "Source" in fact]
    assert len(sources) > 0.9 * len(made) > 0
    assert all(source.startswith("transformers/") for source in sources)
    (gate,) = {f["Code"] for f in facts if f["Module"] == "model.layers.0.mlp.gate_proj"}
    assert "self.gate_proj(x)" in gate
    classes = {fact["Module"].rpartition(".")[2]: fact["Class"] for fact in facts}
    assert classes["q_proj"] == "Linear"
    assert {n["kind"] for n in nodes.values() if n["op"] == "placeholder"} >= {"weight", "slots"}


class OddUse(nn.Module):
    """Its second linear is used in a way that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.odd = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.odd(h) + self.odd.weight.sin().sum()


def test_refusals_are_there_from_the_pass_that_makes_them(
    small: Callable[..., Case], tmp_path: Path
) -> None:
    cm = small(OddUse, ["up", "odd"], ["up"]).compile({"dump": str(tmp_path)}, dynamic=False)
    cm(torch.randn(2, 6), adapter_names=["b", None])
    _, (graph,) = page_data(tmp_path / "index.html")
    at = [stage["name"] for stage in graph["stages"]].index("match")
    others = graph["stages"][at:]
    assert not any(stage["refusals"] for stage in graph["stages"][:at])
    (refused,) = cm._session.backend.records[0].checks.refusals
    told = {"paths": ["odd"], "when": "always", "reason": refused.reason}
    assert all(stage["refusals"] == [told] for stage in others)
    made = [node for node in nodes_of(graph, others[-1]).values() if node["path"] == "odd"]
    assert any("addmm" in node["operator"] for node in made)
    red = {
        graph["nodes"][n]["name"] for n, _, _, mark, _ in others[-1]["nodes"] if mark == "refused"
    }
    assert {node["name"] for node in made if node["op"] != "placeholder"} <= red


def test_a_page_is_written_as_graphs_come(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path))
    cm, feed = plain.compile(dynamic=False), FAMILIES["plain"].inputs
    cm(**feed(2, 4), adapter_names=["a0", None])
    assert len(page_data(tmp_path / "index.html")[1]) == 1
    cm(**feed(2, 4), adapter_names=[None, None])
    about, graphs = page_data(tmp_path / "index.html")
    assert [graph["title"] for graph in graphs] == ["graph 0 lora", "graph 1 base"]
    assert about["texts"] == {"explain.txt": (tmp_path / "explain.txt").read_text()}
    assert graphs[0]["sources"].keys() == cm._session.backend.records[0].sources.keys()
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "later"))
    cm(**feed(1, 4), adapter_names=["a1"])
    _, (later,) = page_data(tmp_path / "later" / "index.html")
    assert later["title"] == "graph 2 lora"


def test_graphs_that_were_not_kept_are_said(plain: Case, tmp_path: Path) -> None:
    cm = plain.compile(dynamic=False)
    cm(**FAMILIES["plain"].inputs(2, 4), adapter_names=["a0", None])
    with pytest.warns(LorafxWarning, match=r"has no stages of graph 0 lora, which were not kept"):
        cm.dump(tmp_path)
    assert "sites: 5" in (tmp_path / "explain.txt").read_text()
    assert page_data(tmp_path / "index.html")[1][0]["stages"] == []


@pytest.mark.slow
def test_a_dump_captures_the_graphs_of_a_call_once_more(plain: Case, tmp_path: Path) -> None:
    cm, inputs = plain.compile(dynamic=False), FAMILIES["plain"].inputs(2, 4)
    rows = ["a0", None]
    want = cm(**inputs, adapter_names=rows)["logits"]
    cm(**inputs)
    before = torch.get_rng_state()
    with pytest.warns(LorafxWarning, match=r"has no stages of graph 1 base, which were not kept"):
        cm.dump(tmp_path / "lora", inputs, rows)
    assert torch.equal(torch.get_rng_state(), before)
    # What serves stays as it is, and a dump as graphs are compiled has the same.
    assert cm.recompiles == 2
    assert torch.equal(cm(**inputs, adapter_names=rows)["logits"], want)
    assert cm.recompiles == 2
    direct = plain.compile({"dump": str(tmp_path / "direct")}, dynamic=False)
    direct(**inputs, adapter_names=rows)
    whole = tmp_path / "direct" / "graph-0-lora"
    for stage in ("04-captured.py", "16-pack.py", "16-pack.diff"):
        again = tmp_path / "lora" / "graph-0-lora" / stage
        assert again.read_text().splitlines()[1:] == (whole / stage).read_text().splitlines()[1:]


def test_a_dump_of_a_call_that_was_never_made(plain: Case, tmp_path: Path) -> None:
    cm, inputs = plain.compile(dynamic=False), FAMILIES["plain"].inputs(2, 4)
    cm.dump(tmp_path, inputs, ["a0", None])
    assert cm.recompiles == 0
    (graph,) = page_data(tmp_path / "index.html")[1]
    assert graph["title"] == "graph 0 lora"
    assert graph["stages"][0]["name"] == "traced"
    cm(**inputs, adapter_names=["a0", None])
    assert cm.recompiles == 1
    with pytest.raises(UnknownAdapterError, match="nobody"):
        cm.dump(tmp_path, inputs, ["nobody", None])


def test_a_folder_that_cannot_be_written_to_changes_no_graph(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "file" / "dump"))
    cm, rows = plain.compile(dynamic=False), ["a0", None]
    inputs = FAMILIES["plain"].inputs(2, 4)
    message = "the dump in .*file/dump is incomplete.*Not a directory"
    with pytest.warns(LorafxWarning, match=message) as seen:
        found = cm(**inputs, adapter_names=rows)
    assert not any("Dynamo failed" in str(warning.message) for warning in seen)
    assert cm.recompiles == 1
    with pytest.raises(ConfigError, match=r"file/dump cannot be written: .*Name a folder"):
        cm.dump(tmp_path / "file" / "dump")
    monkeypatch.delenv("LORAFX_DUMP")
    torch.testing.assert_close(found, plain.compile(dynamic=False)(**inputs, adapter_names=rows))
