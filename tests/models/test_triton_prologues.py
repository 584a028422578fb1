"""Linears whose shrink computes their input, in whole models under `lowering="triton"`, on the CPU
in Triton's interpreter: the deltas of gate and up are added where silu(gate) · up is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from tiny_models import FAMILIES

from lorafx.errors import ConfigError

NAMES = ["a1", None, "a3", "a0", "a2"]
TRITON = {"lowering": "triton"}


def inputs_of(family: str, rows: int = 5, length: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return FAMILIES[family].inputs(rows, length)


def planned(case: Case, plan: dict[str, str], **options: Any) -> Any:
    """Compiled for inputs of one size each."""
    return case.compile(options={**TRITON, "plan": plan, **options}, dynamic=False)


def strategies(cm: Any, part: str) -> set[str]:
    return {
        state.strategy.split(" ")[0]
        for record in cm._session.backend.records
        for state in record.states
        if part in state.site.path
    }


#: Pins of the gated MLP of a Llama of one layer.
MLP = {
    "model.layers.0.mlp.gate_proj": "deferred",
    "model.layers.0.mlp.up_proj": "deferred",
    "model.layers.0.mlp.down_proj": "prologue",
}


@pytest.fixture(scope="module")
def gated(shallow: Case) -> Any:
    return shallow.compile({**TRITON, "plan": MLP, "verify": "numeric"})


def test_a_gated_mlp(shallow: Case, gated: Any) -> None:
    """Mixes, other numbers of requests and tokens: right, by the graphs that there are."""
    cm = gated
    check_mixed(cm, shallow, NAMES, inputs_of("llama"))
    assert strategies(cm, "down_proj") == {"prologue"}
    assert strategies(cm, "gate_proj") == strategies(cm, "up_proj") == {"deferred"}
    graphs = cm.recompiles
    for names in (["a4", "a4", "a0", None, "a1"], [None, None, "a2", "a2", "a2"], ["a3"] * 5):
        check_mixed(cm, shallow, names, inputs_of("llama"))
    check_mixed(cm, shallow, ["a0", "a3", None], inputs_of("llama", 3, 7))
    assert cm.recompiles == graphs
    check_mixed(cm, shallow, ["a1"], inputs_of("llama", 1, 4))


def test_gate_and_up_by_themselves(shallow: Case) -> None:
    """Without `pack` they are two nodes; a delta that is not deferred is in y before it is read."""
    cm = planned(shallow, MLP, passes={"pack": False})
    check_mixed(cm, shallow, NAMES, inputs_of("llama"))
    pins = {**MLP, "model.layers.0.mlp.gate_proj": "segments"}
    cm = planned(shallow, pins, passes={"pack": False})
    check_mixed(cm, shallow, NAMES, inputs_of("llama"))
    assert strategies(cm, "gate_proj") == {"segments"}
    assert strategies(cm, "up_proj") == {"deferred"}


def test_transposed_weights_with_biases(case_of: Any) -> None:
    """GPT-2: gelu between two linears stored (in, out)."""
    case = case_of("gpt2")
    pins = {"transformer.h.0.mlp.c_fc": "deferred", "transformer.h.0.mlp.c_proj": "prologue"}
    cm = planned(case, pins)
    check_mixed(cm, case, NAMES, inputs_of("gpt2"))
    assert strategies(cm, "h.0.mlp.c_proj") == {"prologue"}
    assert strategies(cm, "h.0.mlp.c_fc") == {"deferred"}


def test_base_rows_are_the_bases_own_but_for_the_activation(gated: Any) -> None:
    """Whatever their neighbours' adapters are, base rows keep their bits."""
    inputs = inputs_of("llama")
    some = gated(**inputs, adapter_names=NAMES).logits
    others = gated(**inputs, adapter_names=["a4", None, "a0", "a3", None]).logits
    assert torch.equal(some[1], others[1])
    assert not torch.equal(some[0], others[0])


def test_pins_that_cannot_be_followed(shallow: Case) -> None:
    cm = planned(shallow, {"model.layers.0.mlp.gate_proj": "deferred"})
    with pytest.raises(ConfigError, match=r"pins 'deferred' for .*gate_proj"):
        cm(**inputs_of("llama"), adapter_names=NAMES)
    cm = planned(shallow, {"model.layers.0.self_attn.o_proj": "prologue"})
    with pytest.raises(ConfigError, match="no kernel can compute its input"):
        cm(**inputs_of("llama"), adapter_names=NAMES)
