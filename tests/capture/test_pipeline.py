"""Every rewrite of a graph stands in a list: what the user sees of it, and who is named where it
fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, error
from hand_made import hand_case
from slowly import each
from torch import Tensor, fx, nn

import lorafx
from lorafx.capture.compilation import Compilation, Observer
from lorafx.capture.record import GraphRecord
from lorafx.errors import CaptureError, VerifyError
from lorafx.pass_order import AOT_PASSES, DYNAMO_PASSES, GRAPH_PASSES, LOWERING_PASSES

MIXED = ["a0", None]


class Model(nn.Module):
    """Looks a table up, has gradients in it, and returns a length from before it has counted on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor, lengths: list[Tensor]) -> dict[str, Tensor]:
        (length,) = lengths
        old = length + 0
        length += ids.shape[1]
        h = torch.relu(self.up(self.table(ids)))
        with torch.enable_grad():
            return {"logits": self.down(h), "old": old}


class InTwo(Model):
    def forward(self, ids: Tensor, lengths: list[Tensor]) -> dict[str, Tensor]:
        h = torch.relu(self.up(self.table(ids)))
        torch._dynamo.graph_break()
        return {"logits": self.down(h), "old": lengths[0]}


def case_of(model: nn.Module, folder: Path) -> Case:
    return hand_case(model, folder, a0=["up", "down"])


def inputs() -> dict[str, Any]:
    return {"ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "lengths": [torch.tensor(5)]}


def check(cm: Any, case: Case) -> None:
    got = cm(**inputs(), adapter_names=MIXED)
    assert got["old"].item() == 5
    assert error(got["logits"], case.expected(MIXED, inputs())) <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "options", "shown"),
    [
        (
            Model,
            {"lowering": "inductor"},
            {
                "check_lookups": "checked_index",
                "detach_results": ".detach(",
                "copy_returned_inputs": "aten.clone",
            },
        ),
        (InTwo, {}, {"check_lookups": "checked_index", "look_up_slots": "slots"}),
    ],
)
def test_each_rewrite_has_a_stage_and_a_report(
    model: type[Model], options: dict[str, Any], shown: dict[str, str], tmp_path: Path
) -> None:
    case, dump = case_of(model(), tmp_path), tmp_path / "dump"
    cm = case.compile({"dump": str(dump), **options})
    cm._orig_mod.requires_grad_("detach_results" in shown)
    check(cm, case)
    everything = [*DYNAMO_PASSES, *AOT_PASSES, *GRAPH_PASSES, *LOWERING_PASSES]
    listed, told = str(lorafx.pipeline()), str(cm.explain())
    for item in everything:
        assert f"\n  {item.name} " in listed
        assert f" {item.name}: " in told
    for record in cm._session.backend.records:
        assert [report.name for report in record.passes] == [item.name for item in everything]
    for name, text in shown.items():
        edits = [
            report.edits
            for record in cm._session.backend.records
            for report in record.passes
            if report.name == name
        ]
        assert max(edits) > 0
        diffs = [path.read_text() for path in dump.glob(f"graph-*/*-{name}.diff")]
        added = [line for diff in diffs for line in diff.splitlines() if line.startswith("+")]
        assert any(text in line for line in added), name


def test_graphs_of_the_base_have_the_passes_over_dynamos(tmp_path: Path) -> None:
    case = case_of(Model(), tmp_path)
    cm = case.compile({"dump": str(tmp_path / "dump"), "base_graphs": True})
    cm(**inputs())
    (record,) = cm._session.backend.records
    names = ["traced", *(item.name for item in DYNAMO_PASSES)]
    assert [stage.name for stage in record.stages] == names
    assert [report.edits for report in record.passes] == [1, 0, 0]


def raises(gm: fx.GraphModule, ctx: Any) -> int:
    raise RuntimeError("not today")


def turns_round(gm: fx.GraphModule, ctx: Any) -> int:
    """A result stands behind the output."""
    output = gm.graph.output_node()
    output.append(output.all_input_nodes[-1])
    return 1


PLACES = ["traced", "check_lookups", "captured", "look_up_slots", "outline", "write_back"]
PLACES += ["joint_graph", "copy_returned_inputs"]


@pytest.mark.one_road
@pytest.mark.parametrize("after", each(2, PLACES))
def test_a_broken_pass_beside_a_rewrite_is_named(after: str, tmp_path: Path) -> None:
    case = case_of(Model(), tmp_path)
    broken = (
        (raises, CaptureError, "the pass 'mine' failed"),
        (turns_round, VerifyError, "'mine'"),
    )
    for run, kind, told in broken:
        cm = case.compile({"passes": {"mine": lorafx.After(after, run)}})
        with pytest.raises(kind, match=told):
            cm(**inputs(), adapter_names=MIXED)


def test_a_pass_of_the_users_sees_dynamos_graph(tmp_path: Path) -> None:
    seen: list[str] = []

    def notes(gm: fx.GraphModule, ctx: Any) -> int:
        seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return 0

    case = case_of(Model(), tmp_path)
    check(case.compile({"passes": {"mine": lorafx.After("traced", notes)}}), case)
    assert any("embedding" in name for name in seen)
    with pytest.raises(lorafx.ConfigError, match="pass 'check_lookups' cannot be switched off"):
        case.compile({"passes": {"check_lookups": False}})


class Noting(Observer):
    """Notes what it is told of."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.compilations: list[Compilation] = []

    @contextmanager
    def compiling(self, record: GraphRecord) -> Iterator[None]:
        self.told.append(f"begins {record.title}")
        try:
            yield
        finally:
            self.told.append(f"ends {record.title}")

    def after(self, gm: fx.GraphModule, ctx: Any, done: Any) -> None:
        self.told.append(done if isinstance(done, str) else done.name)

    def compiled(self, compilation: Compilation) -> None:
        self.told.append("compiled")
        self.compilations.append(compilation)

    def guarded(self, guards: Sequence[Any], kept: Sequence[bool], watched: Sequence[Any]) -> None:
        assert len(guards) == len(kept)
        self.told.append("guarded")


@pytest.mark.one_road
def test_an_observer_is_told_of_each_step(tmp_path: Path) -> None:
    case, noting = case_of(Model(), tmp_path), Noting()
    cm = case.compile()
    with cm._session.backend.observed_by(noting):
        cm(**inputs(), adapter_names=MIXED)
    graphs = [item.name for item in (*GRAPH_PASSES, *LOWERING_PASSES)]
    traced = ["traced", *(item.name for item in DYNAMO_PASSES), "captured"]
    compiled = ["begins graph 0 lora", *traced, *graphs, "compiled", "ends graph 0 lora"]
    assert noting.told == [*compiled, "guarded"]
    (compilation,) = noting.compilations
    assert compilation.record is cm._session.backend.records[0]
    assert compilation.whole
    assert compilation.lowered is not None
    torch._dynamo.reset()
    cm(**inputs(), adapter_names=MIXED)
    assert len(noting.compilations) == 1  # the block has ended


@pytest.mark.one_road
def test_an_observer_is_told_of_a_compilation_that_fails(tmp_path: Path) -> None:
    case, noting = case_of(Model(), tmp_path), Noting()
    cm = case.compile({"passes": {"mine": lorafx.After("match", raises)}})
    with cm._session.backend.observed_by(noting), pytest.raises(CaptureError, match="'mine'"):
        cm(**inputs(), adapter_names=MIXED)
    assert noting.told[0] == "begins graph 0 lora"
    assert noting.told[-2:] == ["match", "ends graph 0 lora"]
    assert not noting.compilations
