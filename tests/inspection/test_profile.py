"""`cm.profile` names every site, and what it says adds up. How fast anything is, no test says."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed
from tiny_models import FAMILIES, PlainModel
from torch import Tensor

import lorafx
from lorafx.errors import BatchError, ConfigError
from lorafx.inspection.profile import Profile
from lorafx.inspection.profiling import _site_nodes
from lorafx.runtime.replay import replayed

NAMES = ["a1", None, "a3", "a1"]

Made = tuple[Case, Any, dict[str, torch.Tensor], Profile]


@pytest.fixture(
    scope="module", params=["plain", "llama", pytest.param("vit", marks=pytest.mark.slow)]
)
def made(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Made:
    family = request.param
    case = case_of(family)
    torch.manual_seed(0)
    inputs = FAMILIES[family].inputs(len(NAMES), 5)
    lowering = {"lowering": "inductor"} if family == "plain" else None
    cm = case.compile(lowering)
    check_mixed(cm, case, NAMES, inputs)
    return case, cm, inputs, cm.profile(inputs, NAMES, calls=2)


def test_all_sites_are_there_and_sums_agree(made: Made) -> None:
    case, cm, inputs, profile = made
    found = [path for node in profile.nodes for path in node.paths]
    # The plain model calls three of its sites twice, and each call is a node.
    assert len(found) - len(set(found)) == (3 if profile.model == "PlainModel" else 0)
    assert {*found, *profile.unreached} == {site.path for site in cm.sites}
    assert not set(found) & set(profile.unreached)
    assert profile.sites == pytest.approx(sum(node.whole for node in profile.nodes))
    assert profile.operators == pytest.approx(profile.sites + profile.others)
    assert profile.others >= 0 < profile.served
    for node in profile.nodes:
        assert node.whole > 0
        assert (node.base is None) == (node.delta is None) == (node.measured is None)
        if node.base is not None and node.delta is not None:
            assert node.base > 0 < node.delta
            assert node.whole == pytest.approx(node.base + node.delta)
    together = profile.alike
    assert sum(node.whole for node in together) == pytest.approx(profile.sites)
    assert sum(node.nodes for node in together) == len(profile.nodes)
    graphs = cm.recompiles
    check_mixed(cm, case, NAMES, inputs)
    assert cm.recompiles == graphs


def test_floors_are_those_of_the_ranks_in_the_batch(made: Made) -> None:
    _, cm, _, profile = made
    ranks = {name: cm._session.store[name] for name in ("a1", "a3")}
    sites = {site.path: site for site in cm.sites}
    for node in profile.nodes:
        own = [sites[path] for path in node.paths]
        if any(site.eligible.kind == "embedding" for site in own):
            assert node.floor is None
            continue
        factors = sum(
            stored.rank * (site.in_features + site.out_features)
            for site in own
            for stored in ranks.values()
            if site.path in stored.sites
        )
        weights = sum(site.in_features * site.out_features for site in own)
        assert node.floor == pytest.approx(1 + factors / weights)


def test_products_are_those_of_their_sites(made: Made) -> None:
    """Not those of another site beside it: each has the columns of its own."""
    _, cm, inputs, profile = made
    sites = {site.path: site for site in cm.sites}
    with replayed(cm._entries) as stages:
        stages.current = "lower"
        cm(**inputs, adapter_names=NAMES)
        for record in stages.backend.records:
            if not record.stages:
                continue  # captured before
            (stage,) = (stage for stage in record.stages if stage.name == "lower")
            values = {node.name: node.meta.get("val") for node in stage.graph.graph.nodes}
            claimed: list[str] = []
            for node, base, delta in _site_nodes(stage):
                paths = stage.paths(node)
                claimed += [*base, *delta]
                assert len(delta) == 1
                if base:
                    columns = sum(int(values[name].shape[-1]) for name in base)
                    assert columns == sum(sites[path].out_features for path in paths)
            assert len(claimed) == len(set(claimed))
    if profile.lowering == "inductor":
        assert all(node.base is not None for node in profile.nodes)
        assert {node.strategy.partition(",")[0] for node in profile.nodes} == {"generated"}
        assert ("up", "gate") in [node.paths for node in profile.nodes]
    else:
        assert 'one operator does product and delta where these are "-"' in profile.notes


def test_the_report_as_text_json_and_html(made: Made) -> None:
    profile = made[3]
    text = str(profile)
    assert all(node.paths[0].rpartition(".")[2] in text for node in profile.nodes)
    read = json.loads(json.dumps(profile.json()))
    assert [row["paths"] for row in read["nodes"]] == [list(n.paths) for n in profile.nodes]
    assert read["sites"] == pytest.approx(profile.sites)
    assert html.unescape(profile._repr_html_()) == f"<pre>{text}</pre>"


def test_what_cannot_be_profiled(made: Made) -> None:
    _, cm, inputs, _ = made
    with pytest.raises(BatchError, match="no request of the batch has an adapter"):
        cm.profile(inputs, [None, "__base__", None, None])
    with pytest.raises(ConfigError, match="calls = 0"):
        cm.profile(inputs, NAMES, calls=0)
    with pytest.raises(lorafx.UnknownAdapterError):
        cm.profile(inputs, ["nobody"] * 4)


@pytest.mark.slow
def test_the_graph_is_measured_where_calls_are_answered_eagerly(
    case_of: Callable[..., Case],
) -> None:
    """It is compiled first, and the report says how the calls were served."""
    case, inputs = case_of("plain"), FAMILIES["plain"].inputs(len(NAMES), 5)
    cm = case.compile({**REFERENCE, "start": "eager"})
    check_mixed(cm, case, NAMES, inputs)
    assert cm.recompiles == 0
    profile = cm.profile(inputs, NAMES, calls=1)
    assert profile.way == "compiled"
    assert "as served (compiled)" in str(profile)
    assert cm.recompiles == 1
    assert lorafx.bisect(cm, inputs, NAMES).first is None


class InPieces(PlainModel):
    """Dynamo gives its loop up, so Python runs between the graphs."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for _ in range(2):
            torch._dynamo.graph_break()
            x = x + self.down(torch.relu(self.gate(x)) * self.up(x))
        return {"logits": self.head(x)}


@pytest.mark.slow
def test_a_model_of_several_graphs(plain: Case) -> None:
    """After calls whose graphs are known, and again; what serves goes on as it was."""
    model = InPieces().eval().requires_grad_(False)
    model.load_state_dict(plain.base.state_dict())
    torch.manual_seed(0)
    inputs = FAMILIES["plain"].inputs(len(NAMES), 5)
    cm = lorafx.compile(model, plain.folders, options=REFERENCE)
    for _ in range(2):
        check_mixed(cm, plain, NAMES, inputs)
        profile = cm.profile(inputs, NAMES, calls=1)
        assert {path for node in profile.nodes for path in node.paths} == {s.path for s in cm.sites}
    graphs = cm.recompiles
    assert lorafx.bisect(cm, inputs, NAMES).first is None
    check_mixed(cm, plain, NAMES, inputs)
    assert cm.recompiles == graphs > 1
