"""The sweep over all families: its parts, what it goes on from, what it runs through Inductor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sweep
import tiny
from sites import sites_of
from tiny_inputs import inputs

pytestmark = pytest.mark.quick


def report(name: str, operators: str = "", kind: str = "causal", **more: object) -> dict:
    return {
        **{"kind": kind, "type": name, "lowering": "reference", "outcome": "ok"},
        **{"effect": 1.0, "operators": operators.split(), **more},
    }


@pytest.mark.parametrize("count", [3])
def test_parts_are_all_families_once_and_hold_every_kind(count: int) -> None:
    every = [family for kind in tiny.KINDS for family in tiny.families(kind)]
    parts = [sweep.part_of(every, f"{number + 1}/{count}") for number in range(count)]
    together = [family for part in parts for family in part]
    assert len(together) == len(set(together)) == len(every)
    assert set(together) == set(every)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        assert {family.kind for family in part} == set(tiny.KINDS)


def test_a_line_that_was_cut_off_is_run_again_and_spoils_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    sweep.append(out, report("llama"))
    with out.open("a") as file:
        file.write(json.dumps(report("bloom"))[:20])
    sweep.append(out, report("opt"))
    assert [r["type"] for r in sweep.read(out)] == ["llama", "opt"]


def test_cover_takes_what_holds_most_that_is_missing() -> None:
    reports = [
        report("a", "mm add"),
        report("b", "mm add mul sin"),
        report("c", "sin cos"),
        report("d", "mm"),
        report("e", "mm add mul sin cos", outcome="refused"),
        report("f", "mm"),
    ]
    # b holds most; c alone has cos; then all are covered, and a holds most once more.
    assert [name for _, name in sweep.chosen(reports, share=0.6)] == ["b", "c", "a"]
    assert sweep.chosen(reports[::-1], share=0.6) == sweep.chosen(reports, share=0.6)


def test_routers_and_experts_are_found_by_what_they_do() -> None:
    family = next(f for f in tiny.families("causal") if f.model_type == "qwen2_moe")
    model = tiny.build(family, num_hidden_layers=1, layer_types=["full_attention"])
    sites = sites_of(model, inputs(model, "causal", 2, 3))
    assert sites.routers == ("model.layers.0.mlp.gate.weight",)
    assert sites.experts == tuple(
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    )
    assert sites.embeddings == ("model.embed_tokens",)
