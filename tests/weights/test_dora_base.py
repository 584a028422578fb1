"""DoRA and the base weights: norms follow new weights, and merging scales what it sums."""

from __future__ import annotations

import pytest
import torch
from dense_merge import TOLERANCE, Case, check_mixed, error
from dora_cases import family_case
from merging import bits
from namings import new_weights
from tiny_models import FAMILIES
from torch import Tensor

from lorafx.errors import ConfigError

NAMES = ["d0", None, "p2", "d1", "d3", "d0"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return family_case("plain", tmp_path_factory.mktemp("plain"))


def inputs(rows: int = len(NAMES)) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    return FAMILIES["plain"].inputs(rows, 4)


def test_norms_follow_new_weights(case):
    """Adapters with a slot and without; graphs and addresses stay."""
    cm = case.compile()
    check_mixed(cm, case, NAMES, inputs())
    graphs = cm.recompiles
    new = Case(new_weights(case.base, 5), case.folders)
    cm.load_weights(new.base.state_dict())
    check_mixed(cm, new, NAMES, inputs())
    cm.unload_adapter("d1")
    cm.load_weights(list(case.base.state_dict().items()))
    cm.load_adapter(case.folders["d1"], "d1")
    check_mixed(cm, case, NAMES, inputs())
    assert cm.recompiles == graphs


def test_merge_and_unmerge(case):
    name = "d1"
    cm = case.compile()
    before, x = bits(cm), inputs(3)
    report = cm.merge(name)
    assert report.error < 1e-5
    with torch.no_grad():
        got = cm._orig_mod(**x)["logits"]
    assert error(got, case.expected([name] * 3, x)) <= TOLERANCE
    cm.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in bits(cm).items())
    check_mixed(cm, case, NAMES, inputs())


def test_dora_is_not_measured_on_merged_weights(case):
    cm = case.compile()
    cm.merge("p2")
    with pytest.raises(
        ConfigError, match=r"'new' is a DoRA adapter, .* unmerge\(\) before loading it"
    ):
        cm.load_adapter(case.folders["d1"], "new")
    cm.unmerge()
    cm.load_adapter(case.folders["d1"], "new")
