"""Absorbed weights and compiled graphs see new base weights, or the update is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from absorbed import AbsorbedAttention, OneLayer, absorbed, case_of, post_process, states
from dense_merge import REFERENCE, Case, check_mixed
from namings import new_weights, plain

import lorafx
from lorafx.errors import BaseWeightsError, MatchError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

NAMES = ["a", None, "b", "c"]
IDS = {"input_ids": torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(1))}
ROWS = ["a0", None, "a2"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One attention of DeepSeek-V3 as transformers computes it."""
    return case_of(OneLayer, tmp_path_factory.mktemp("layer"))


def served_layer(layer: Case, kept: str) -> Any:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model, kept)
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


def test_absorbed_views(layer: Case) -> None:
    cm = served_layer(layer, "views")
    check_new(cm, layer)
    check_new(cm, layer, 4)


@pytest.mark.parametrize("kept", ["copies", "permuted copies", "parameters"])
def test_absorbed_copies_are_refused(layer: Case, kept: str) -> None:
    """By updates and merges of their weight alone."""
    cm = served_layer(layer, kept)
    fresh = plain(new_weights(layer.base, 3))
    refused = r"kv_b_proj.weight: self_attn.w_u[kv] repeats its numbers"
    with pytest.raises(BaseWeightsError, match=refused):
        cm.load_weights(fresh, strict=False)
    with pytest.raises(MatchError, match=refused):
        cm.merge("a")
    check_mixed(cm, layer, NAMES, states(4, 4))
    cm.merge("c")
    cm.unmerge()
    name = "self_attn.o_proj.weight"
    cm.load_weights({name: fresh[name]}, strict=False)
    assert torch.equal(cm.model.self_attn.o_proj.weight, fresh[name])


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
