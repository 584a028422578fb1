"""Stamps: what AOTAutograd traced once is the graph of every layer, or each layer is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from stacks import LAYERS, Block, H, Stack, case_of, constant, dtype, hook, own_forward, stack
from torch import Tensor, fx, nn

import lorafx
from lorafx.capture import backend
from lorafx.capture.stamps import Folded
from lorafx.passes.outline.isomorphism import CanonicalForm, stretch_of
from lorafx.program.context import Context

pytestmark = pytest.mark.quick

NAMES = ["a0", None, "a1"]


@dataclass
class Seen:
    """What was folded in each graph, and the graph that the passes began with.

    `layers`: of each kind how many; `forms`: the form of the whole graph, which of its inputs are
    its operands, and which of its nodes it returns.
    """

    layers: list[list[int]] = field(default_factory=list)
    forms: list[tuple[CanonicalForm, list[int], list[int]]] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, unfold = Seen(), backend.unfold

    def noting(graph: fx.Graph, folded: Folded) -> None:
        unfold(graph, folded)
        found.layers.append([1 + len(kind.others) for kind in folded.kinds])

    monkeypatch.setattr(backend, "unfold", noting)
    return found


def options(seen: Seen, stamps: bool) -> dict[str, Any]:
    def look(gm: fx.GraphModule, ctx: Context) -> int:
        nodes = list(gm.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        calls = [node for node in nodes if node.op == "call_function"]
        whole = stretch_of(gm, calls)
        returned = [calls.index(item) for item in nodes[-1].args[0] if item in calls]
        places = [inputs.index(node) for node in whole.operands]
        seen.forms.append((whole.form, places, returned))
        return 0

    return {
        "shortcuts": ["stamps"] if stamps else [],
        "passes": {"look": lorafx.After("captured", look)},
    }


def compare(case: Case, seen: Seen, *, rows: int = len(NAMES)) -> None:
    """The same graph with stamps as without, the same bits, and the oracle's."""
    inputs = {"x": torch.randn(rows, 5, H)}
    names = (NAMES * rows)[:rows]
    results = []
    for switch in (False, True):
        torch._dynamo.reset()
        cm: Any = case.compile(options(seen, switch), dynamic=False)
        check_mixed(cm, case, names, inputs)
        results.append(cm(**inputs, adapter_names=names)["logits"])
    assert torch.equal(*results)
    without, with_stamps = seen.forms
    assert without == with_stamps


def test_equal_layers_are_traced_once(tmp_path: Path, seen: Seen) -> None:
    compare(stack(tmp_path), seen)
    assert seen.layers == [[LAYERS]]


CHANGES = [constant, own_forward, hook, dtype]


@pytest.mark.parametrize(
    ("change", "at"),
    [(change, place % LAYERS) for place, change in enumerate(CHANGES)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_layer_that_differs_is_traced_by_itself(
    tmp_path: Path, seen: Seen, change: Callable[[nn.Module], Any], at: int
) -> None:
    compare(stack(tmp_path, change, at), seen)
    assert seen.layers == [[LAYERS - 1]]


class Pairs(Stack):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x, flat = layer(x)
            flat.add_(1)
            x = x + flat.view_as(x)
        return {"logits": x}


class Halves(Block):
    """Returns two views of one tensor, one of which is written into."""

    def forward(self, h: Tensor) -> Any:
        y = super().forward(h)
        return y, y.view(-1)


def test_layers_that_do_more_than_compute_are_traced(tmp_path: Path, seen: Seen) -> None:
    torch.manual_seed(0)
    base = Pairs(Halves).eval().requires_grad_(False)
    case = case_of(base, tmp_path)
    inputs = {"x": torch.randn(3, 5, H)}
    for switch in (False, True):
        torch._dynamo.reset()
        cm: Any = case.compile(options(seen, switch), dynamic=False)
        given = {"x": inputs["x"].clone()}
        got = cm(**given, adapter_names=NAMES)["logits"]
        want = torch.cat(
            [
                case.alone(name)(x=inputs["x"][row : row + 1].clone())["logits"]
                for row, name in enumerate(NAMES)
            ]
        )
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert all(LAYERS not in kinds for kinds in seen.layers)


class Random(Block):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + torch.rand_like(h) * 0


def test_each_layer_draws_random_numbers_of_its_own(tmp_path: Path, seen: Seen) -> None:
    torch.manual_seed(0)
    compare(case_of(Stack(Random).eval().requires_grad_(False), tmp_path), seen)
    drawn = [node[1] for node in seen.forms[1][0].nodes].count(torch.ops.aten.rand.default)
    assert drawn == LAYERS


def test_what_dynamo_guards_of_each_layer_is_still_guarded(tmp_path: Path, seen: Seen) -> None:
    case = stack(tmp_path)
    cm: Any = case.compile({"shortcuts": ["stamps"]}, dynamic=False)
    inputs = {"x": torch.randn(3, 5, H)}
    before = cm(**inputs, adapter_names=NAMES)["logits"]
    cm.model.layers[2].scale = 3.0
    changed = cm(**inputs, adapter_names=NAMES)["logits"]
    assert cm.recompiles == 2
    assert seen.layers == [[LAYERS], [LAYERS - 1]]
    assert not torch.allclose(before, changed)
    case.base.layers[2].scale = 3.0
    case.merged.clear()
    check_mixed(cm, case, NAMES, inputs)
