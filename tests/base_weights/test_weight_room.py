"""Weights with room beside their columns: the model is saved, merged and updated as any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_merge import TOLERANCE, Case, check_mixed, error
from tiny_models import FAMILIES

pytestmark = pytest.mark.usefixtures("fixed_sizes")

NAMES = ["a1", None, "a3"]


def test_a_model_with_room_is_saved_merged_and_updated(
    case_of: Callable[..., Case], tmp_path: Path
) -> None:
    case = case_of("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    cm = case.compile(options={"weight_room": True})
    torch.manual_seed(1)
    inputs = FAMILIES["llama"].inputs(3, 4)
    q = cm.model.model.layers[0].self_attn.q_proj.weight
    assert q.stride(0) > q.shape[1]
    check_mixed(cm, case, NAMES, inputs)

    cm.model.save_pretrained(tmp_path)
    loaded = type(case.base).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in case.base.state_dict().items())

    cm.merge("a1")
    got = cm(**inputs)["logits"]
    assert error(got, case.expected(["a1"] * 3, inputs)) <= TOLERANCE
    cm.unmerge()
    check_mixed(cm, case, NAMES, inputs)

    other = copy.deepcopy(case.base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    cm.load_weights(other.state_dict().items())
    with torch.no_grad():
        want = other(**inputs)["logits"]
    assert error(cm(**inputs)["logits"], want) <= TOLERANCE
    assert q.stride(0) > q.shape[1]
    assert cm.model.model.layers[0].self_attn.q_proj.weight is q
