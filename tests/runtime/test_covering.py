"""A configuration for adapters that come later is what it would be if they were given at once."""

from __future__ import annotations

import pytest
from dense_merge import random_base
from own_weights import own_case

from lorafx import LoraConfig
from lorafx.model.targets import AdapterNames
from lorafx.runtime.marking import covering, request_of

ADAPTERS = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5, 9]},
    "dora": {"target_modules": ["k_proj"], "use_dora": True},
    "fewer": {"target_modules": ["v_proj", "o_proj"], "trainable_token_indices": [7]},
}


@pytest.mark.quick
@pytest.mark.parametrize("targets", [None, ["q_proj", "up_proj"]])
def test_covering(tmp_path, targets):
    base = random_base("llama", num_hidden_layers=1)
    case = own_case(base, tmp_path, ADAPTERS)
    asked = LoraConfig(target_modules=targets, max_adapters=3, trainable_tokens=2)
    later = covering(asked, case.folders.values(), base)
    at_once = request_of(asked, case.folders, base).config
    assert later == at_once
    assert isinstance(later.target_modules, AdapterNames) == (targets is None)
    assert later.use_dora
    assert max(later.trainable_tokens.values()) == 3
    assert later.modules_to_save
