"""What depends on base weights sees new ones: absorbed copies and compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from absorbed import REFERENCE, AbsorbedAttention, OneLayer, absorbed, case_of, post_process, states
from dense_merge import Case, check_mixed
from namings import new_weights, plain

import lorafx

pytestmark = pytest.mark.usefixtures("fixed_sizes")

NAMES = ["a", None, "b", "c"]
IDS = {"input_ids": torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(1))}
ROWS = ["a0", None, "a2"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One attention of DeepSeek-V3 as transformers computes it."""
    return case_of(OneLayer, tmp_path_factory.mktemp("layer"))


def served_layer(layer: Case, keep: Any) -> Any:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    keep(model)
    check_mixed(cm, layer, NAMES, states(4, 4))
    return cm


def check_new(cm: Any, layer: Case, seed: int = 3) -> None:
    """New weights by the names of the model that is not absorbed."""
    fresh = new_weights(layer.base, seed)
    graphs = cm.recompiles
    kept = [
        value.data_ptr()
        for module in cm.model.modules()
        if isinstance(module, AbsorbedAttention)
        for value in (module.w_uk, module.w_uv)
    ]
    cm.load_weights(plain(fresh))
    check_mixed(cm, Case(fresh, layer.folders), NAMES, states(4, 4))
    assert cm.recompiles == graphs
    assert kept == [
        value.data_ptr()
        for module in cm.model.modules()
        if isinstance(module, AbsorbedAttention)
        for value in (module.w_uk, module.w_uv)
    ]


@pytest.mark.parametrize("kept", ["views", "copies", "parameters"])
def test_absorbed_weights(layer: Case, kept: str) -> None:
    cm = served_layer(layer, lambda model: post_process(model, kept))
    check_new(cm, layer)
    check_new(cm, layer, 4)


def test_what_inductor_compiled(shallow: Case) -> None:
    """Weights are inputs of its graphs, none is folded into one or laid out anew, also where the
    process is set to freeze them."""
    with torch._inductor.config.patch(freezing=True):
        cm = shallow.compile({"lowering": "inductor"})
        for names in (ROWS, [None] * 3):
            cm(**IDS, adapter_names=names)
        graphs = cm.recompiles
        fresh = new_weights(shallow.base, 6)
        cm.load_weights(iter(plain(fresh).items()))
        case = Case(fresh, shallow.folders)
        check_mixed(cm, case, ROWS, IDS)
        check_mixed(cm, case, [None] * 3, IDS)
        assert cm.recompiles == graphs
