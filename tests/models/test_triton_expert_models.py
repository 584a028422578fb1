"""Mixture-of-experts models under `lowering="triton"`, on the CPU in Triton's interpreter, against
dense merge: deltas of routed experts by generated kernels, whatever the routing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from expert_models import experts_modules, moe_case

from lorafx.errors import ConfigError

NAMES = ["params", None, "older", "down", "dense"]
PINNED = {"gate_up_proj": "segments", "down_proj": "gemv"}


def plan_of(case: Case, **strategies: str) -> dict[str, str]:
    return {
        f"{path}.{name}": strategy
        for path, _ in experts_modules(case.base)
        for name, strategy in strategies.items()
    }


def ids(rows: int, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 100, (rows, length), generator=generator)}


def chosen(cm: Any) -> dict[str, str]:
    """Strategy by name of the experts' parameter."""
    return {
        state.site.path.rpartition(".")[2]: state.strategy.partition(" ")[0]
        for record in cm._session.backend.records
        for state in record.states
        if state.site.experts > 1
    }


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny Qwen3-MoE."""
    return moe_case("qwen3_moe", tmp_path_factory.mktemp("moe"))


def test_generated_deltas_for_every_mix_routing_and_length(shallow: Case) -> None:
    options = {"lowering": "triton", "plan": plan_of(shallow, **PINNED)}
    cm = shallow.compile(options)
    check_mixed(cm, shallow, NAMES, ids(5, 2))
    assert chosen(cm) == PINNED
    graphs = cm.recompiles
    check_mixed(cm, shallow, NAMES[:3], ids(3, 3, seed=4))
    same = {"input_ids": torch.full((5, 2), 7)}  # every token of a request goes the same way
    check_mixed(cm, shallow, NAMES, same)
    assert cm.recompiles == graphs


def test_a_pin_for_something_else_is_refused(shallow: Case) -> None:
    cm = shallow.compile({"lowering": "triton", "plan": plan_of(shallow, down_proj="split")})
    with pytest.raises(Exception, match="base product is not part of the node") as raised:
        cm(**ids(5, 4), adapter_names=NAMES)
    assert isinstance(raised.value, ConfigError) or "ConfigError" in str(raised.value)
