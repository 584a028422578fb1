"""`explain` as values, as text and as HTML; what it says of adapters is measured on the merged
model."""

from __future__ import annotations

import html
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dense_merge import TOLERANCE, error
from expert_models import moe_case

from lorafx.capture import compile_log
from lorafx.capture.compile_log import timed
from lorafx.pass_order import MODEL_PASSES

KINDS = ["llama", "plain"]


def by_name(report: Any) -> dict[str, Any]:
    return {adapter.name: adapter for adapter in report.adapters}


@pytest.mark.parametrize("family", KINDS)
def test_the_report_has_fields(family: str, looked: Any) -> None:
    found = looked(family)
    cm, report = found.cm, found.cm.explain()
    assert [site.path for site in report.sites] == [site.path for site in cm.sites]
    assert sum(bank.nbytes for bank in report.banks) == cm.memory()["banks"]
    lora, base = report.graphs[:2]
    assert (lora.lora, base.lora) == (True, False)
    assert lora.serves.startswith("with adapters, ")
    assert "several requests" in lora.serves
    assert base.reason == "new: without adapters"
    served = [path for node in lora.nodes for path in node.sites]
    assert set(served) | set(report.unreached) == {site.path for site in cm.sites}
    assert any(node.form == "packed" and len(node.sites) > 1 for node in lora.nodes)
    assert not report.refusals
    assert list(lora.seconds) == ["Dynamo", "AOTAutograd", "passes", "reference"]
    spent = sum(graph.seconds["Dynamo"] for graph in report.graphs)
    assert report.seconds["Dynamo"] == pytest.approx(spent)
    assert all(0 < seconds < 600 for seconds in lora.seconds.values())


@pytest.mark.parametrize("family", KINDS)
def test_norms_are_those_of_the_merged_model(family: str, looked: Any) -> None:
    found = looked(family)
    adapters = by_name(found.cm.explain())
    merged, base = found.case.alone("a1"), found.case.base
    for path in adapters["a1"].sites:
        change = merged.get_submodule(path).weight - base.get_submodule(path).weight
        want = float(change.double().norm())
        assert adapters["a1"].norms[path] == pytest.approx(want, rel=1e-4)
    whole = [
        (new.double() - old.double()).norm() ** 2
        for new, old in zip(merged.parameters(), base.parameters(), strict=True)
    ]
    assert adapters["a1"].norm == pytest.approx(float(sum(whole)) ** 0.5, rel=1e-4)
    assert adapters["a1"].idle == ()
    assert adapters["a1"].why_idle == ""


@pytest.mark.parametrize("family", KINDS)
def test_an_adapter_whose_b_is_zero_is_told(family: str, looked: Any) -> None:
    found = looked(family)
    report = found.cm.explain()
    idle = by_name(report)["idle"]
    assert idle.why_idle == "no effect, because B is zero"
    assert idle.norm == 0
    assert set(idle.idle) == set(idle.sites)
    assert "without effect: idle (no effect, because B is zero)" in report.summary[1]
    assert any("no effect, because B is zero" in line for line in str(report).splitlines())
    base = found.cm(**found.inputs)["logits"]
    assert error(found.output[3], base[3]) <= TOLERANCE  # as it is


@pytest.mark.parametrize("family", KINDS)
def test_all_forms_say_the_same(family: str, looked: Any) -> None:
    cm = looked(family).cm
    report = cm.explain()
    assert len(report.summary) == 5
    assert str(report).splitlines()[:5] == list(report.summary)
    values = json.loads(json.dumps(report.json()))
    assert values["summary"] == list(report.summary)
    assert [site["path"] for site in values["sites"]] == [site.path for site in report.sites]
    assert values["adapters"][0]["norm"] == report.adapters[0].norm
    assert values["graphs"][0]["passes"][0]["name"] == "check_lookups"
    assert [each["name"] for each in values["prepared"]] == [item.name for item in MODEL_PASSES]
    assert values["prepared"][1]["notes"] == list(report.prepared[1].notes) != []

    shown = html.unescape(report._repr_html_())
    for line in (*report.summary, *report.prepared[1].notes):
        assert line in shown
    lines = repr(cm).splitlines()
    assert len(lines) <= 10
    assert lines[0] == "CompiledModel("
    assert lines[1].strip() == report.summary[0]


@pytest.mark.quick
def test_seconds_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.25, 1.5, 2.0, 4.0, 5.0, 5.5])
    monkeypatch.setattr(compile_log, "time", SimpleNamespace(perf_counter=clock.__next__))
    seconds: dict[str, float] = {}
    with timed(seconds, "a"), timed(seconds, "b"), timed(seconds, "c"):
        pass
    with timed(seconds, "b"):
        pass
    assert list(seconds.items()) == [("a", 3.0), ("b", 1.25), ("c", 0.25)]


def test_the_norms_of_routed_experts(tmp_path: Path) -> None:
    """No graph is needed."""
    case = moe_case("mixtral", tmp_path)
    cm = case.compile()
    seen = 0
    for adapter in cm.explain().adapters:
        merged = dict(case.alone(adapter.name).named_parameters())
        base = dict(case.base.named_parameters())
        for path in adapter.sites:
            name = path if path in base else f"{path}.weight"
            want = float((merged[name] - base[name]).double().norm())
            assert adapter.norms[path] == pytest.approx(want, rel=1e-4), (adapter.name, path)
            seen += name == path
    assert seen
    site = next(site.path for site in cm.sites if site.expert_weight is not None)
    name = next(adapter.name for adapter in cm.explain().adapters if site in adapter.sites)
    told = cm.why(site, adapter=name)
    assert told.selected
    assert told.adapter.norm == by_name(cm.explain())[name].norms[site]
