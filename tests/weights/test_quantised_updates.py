"""`load_weights` of weights that a library's tensor subclass holds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from expert_models import experts_modules, ids, moe_base
from quantised_experts import PARAMETERS, quantised

import lorafx
from lorafx.errors import BaseWeightsError


def test_weights_of_the_same_class_are_written(tmp_path: Path) -> None:
    """In place, so graphs stay; as a mapping, from a generator, and the model's own."""
    model, case = quantised(moe_base("qwen3_moe"), "int8", tmp_path)
    model.set_experts_implementation("lorafx")
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_mixed(cm, case, ["down", "older", None], ids(3))
    graphs, base = cm.recompiles, moe_base("qwen3_moe")
    for sign, lazy in ((-0.5, False), (2.0, True)):
        for parameter in base.parameters():
            parameter.mul_(sign)
        new, other = quantised(base, "int8", tmp_path / str(lazy))
        pairs = iter(new.state_dict().items()) if lazy else new.state_dict()
        assert "model.layers.0.mlp.experts.down_proj" in cm.load_weights(pairs).loaded
        check_mixed(cm, Case(other.base, case.folders), ["down", "dense", None], ids(3))
    cm.load_weights(model.state_dict())
    check_mixed(cm, Case(other.base, case.folders), ["down", "dense", None], ids(3))
    assert cm.recompiles == graphs


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """By name, and nothing is written: plain numbers, other settings, one expert, and names that
    transformers converts."""
    model, case = quantised(moe_base("mixtral"), "int8", tmp_path)
    model.set_experts_implementation("lorafx")
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    with torch.no_grad():
        before = model(**ids(2)).logits
    ((path, experts),) = experts_modules(model)
    new, dense = copy.deepcopy(model.state_dict()), case.base.state_dict()
    new["model.embed_tokens.weight"].mul_(2)
    places = [f"{path}.{name}" for name in PARAMETERS]
    four_bits = quantised(moe_base("mixtral"), "int4", tmp_path / "int4")[0].state_dict()
    other = copy.deepcopy(new)
    other[places[1]].block_size = [1, 1, 8]
    one = {f"{path}.{e}.w2.weight": new[places[1]][e] for e in range(experts.num_experts)}
    del new[places[1]]
    for given, message in (
        ({places[1]: dense[places[1]]}, r"down_proj: it is kept here as a Int8Tensor.*quantised"),
        ({places[1]: four_bits[places[1]]}, r"down_proj: .*is a IntxUnpackedToInt8Tensor"),
        ({places[1]: other[places[1]]}, "down_proj: its Int8Tensor has parts of other"),
        (one, "0.w2.weight: a Int8Tensor is written as a whole only"),
    ):
        with pytest.raises(BaseWeightsError, match=message):
            cm.load_weights({**new, **given}, strict=False)
    with torch.no_grad():
        assert error(model(**ids(2)).logits, before) <= TOLERANCE
