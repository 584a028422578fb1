"""`lorafx.bisect` finds passes that were made wrong, and the site."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import wrong_passes
from dense_merge import Case, case_by_targets
from slowly import few
from tiny_models import FAMILIES
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import lorafx
from lorafx.errors import BatchError, ConfigError
from lorafx.kernels.cpu.weight_mm import WEIGHT_MM_DELTA

pytestmark = pytest.mark.any_sizes

NAMES = ["a1", None, "a3", "a0"]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return FAMILIES["plain"].inputs(len(NAMES), 5)


def wrong(case: Case, after: str, run: Callable[..., int]) -> Any:
    return case.compile({"passes": {"mine": lorafx.After(after, run)}}, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "vit"])
def test_a_right_program_has_no_difference(case_of: Callable[..., Case], family: str) -> None:
    case = case_of(family)
    cm = case.compile(dynamic=family == "llama")
    given = FAMILIES[family].inputs(len(NAMES), 5)
    before = {name: tensor.clone() for name, tensor in cm._orig_mod.state_dict().items()}
    cm(**given, adapter_names=NAMES)
    graphs = cm.recompiles
    found = lorafx.bisect(cm, given, NAMES)
    assert (found.first, found.site) == (None, None)
    assert str(found).startswith("no difference above tolerance")
    names = [stage.name for stage in found.stages]
    assert names[0] == "provenance"
    assert names[-1] == "write_back"
    assert all(0 <= stage.error <= 1e-5 for stage in found.stages)
    assert 0 <= found.served <= 1e-5
    # Everything is as it was: weights bit for bit, graphs, what serves.
    assert all(torch.equal(cm._orig_mod.state_dict()[name], own) for name, own in before.items())
    cm(**given, adapter_names=NAMES)
    assert cm.recompiles == graphs


@pytest.mark.parametrize(
    ("after", "run", "site", "behind"),
    few(
        [
            ("pack", wrong_passes.double_all, ("embed",), False),
            ("plan", wrong_passes.double_relu, ("gate",), True),
        ],
        "plan",
    ),
)
def test_a_wrong_pass_and_its_site_are_found(
    plain: Case, inputs: Any, after: str, run: Callable[..., int], site: Any, behind: bool
) -> None:
    found = lorafx.bisect(wrong(plain, after, run), inputs, NAMES)
    assert found.first == "mine"
    assert found.site is not None
    assert (found.site.paths, found.site.behind) == (site, behind)
    assert found.site.error > found.tolerance
    errors = {stage.name: stage.error for stage in found.stages}
    assert errors[after] <= 1e-5
    assert errors["mine"] > found.tolerance
    assert found.served > found.tolerance
    assert str(found).startswith(f"first wrong after: mine; first site {site[0]}")
    assert json.loads(json.dumps(found.json()))["site"]["paths"] == list(site)


def test_an_error_from_before_rows_are_known(plain: Case, inputs: Any) -> None:
    found = lorafx.bisect(wrong(plain, "match", wrong_passes.double_relu), inputs, NAMES)
    assert (found.first, found.site) == ("provenance", None)
    (note,) = found.notes
    assert note.endswith(
        "cannot be told apart from provenance: look_up_slots, write_in_place, match, mine, give_out"
    )


def test_what_cannot_be_bisected(plain: Case, inputs: Any) -> None:
    cm = plain.compile(dynamic=False)
    with pytest.raises(ConfigError, match=r"takes a model from lorafx\.compile"):
        lorafx.bisect(plain.base, inputs, NAMES)
    with pytest.raises(BatchError, match="3 adapter_names for a batch of 4"):
        lorafx.bisect(cm, inputs, NAMES[:3])
    with pytest.raises(ConfigError, match="not sums of them"):
        lorafx.bisect(cm, inputs, [{"a1": 0.5, "a0": 0.5}, None, None, None])
    with pytest.raises(lorafx.UnknownAdapterError):
        lorafx.bisect(cm, inputs, ["nobody"] * 4)
    cm.merge("a1")
    with pytest.raises(ConfigError, match="call unmerge"):
        lorafx.bisect(cm, inputs, ["a1"] * 4)


aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.first(x))))


class Twice(CustomGraphPass):
    """The product of `up`, whose results are 10 wide."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is WEIGHT_MM_DELTA and node.meta["val"].shape[-1] == 10:
                with graph.inserting_after(node):
                    twice = graph.call_function(aten.mul.Tensor, (node, 2.0))
                twice.meta.update(node.meta)
                node.replace_all_uses_with(twice)
                twice.args = (node, 2.0)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> lorafx.CompiledModel:
    torch.manual_seed(0)
    model, folder = Net().eval(), tmp_path_factory.mktemp("adapters")
    case = case_by_targets(model, folder, dict.fromkeys("ab", "all-linear"))
    return lorafx.compile(model, case.folders, options={"lowering": "inductor"})


X, ROWS = {"x": torch.randn(3, 6)}, ["a", None, "b"]


@pytest.mark.one_road
def test_a_wrong_product_is_found(compiled: lorafx.CompiledModel) -> None:
    torch._dynamo.reset()
    with config.patch(post_grad_custom_pre_pass=Twice()):
        found = lorafx.bisect(compiled, X, ROWS)
    assert found.first == "lowering (inductor)"
    assert found.served > found.tolerance
    assert all(stage.error <= found.tolerance for stage in found.stages)
    assert found.site is None
    assert "Options(plan={path: 'aten'})" in str(found)
