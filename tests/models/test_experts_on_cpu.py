"""Routed experts by generated C++, one op a product, whichever way the base computes it; and by
generated Triton kernels, in Triton's interpreter. Both against dense merge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from expert_models import experts_modules, moe_case
from torch._inductor.utils import run_and_get_code

import lorafx
from lorafx.errors import ConfigError

pytestmark = pytest.mark.any_sizes

NAMES = ["params", None, "older", "down", "dense", "params"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield moe_case("qwen3_moe", Path(tmp_path_factory.mktemp("moe")))
    torch._dynamo.reset()


def ids(rows: int = 6, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(1, 60, (rows, length), generator=generator)}


@pytest.mark.slow
def test_one_op_a_product(case: Case) -> None:
    """The keys are found inside of it; nothing of slots, experts or rows is computed beside it."""
    cm = case.compile({"lowering": "inductor"}, dynamic=False)
    with torch.no_grad():
        _, code = run_and_get_code(lambda: cm(**ids(), adapter_names=NAMES))
    text = "\n".join(code)
    assert text.count("ops.lorafx.run_expert_delta_.default(") == 2
    assert "expert_slots" not in text
    assert "searchsorted" not in text
    # The base's own product is by a generated kernel as well.
    assert text.count("ops.lorafx.grouped_mm.default(") == 2
    assert "grouped_mm_fallback.default(" not in text
    assert "aten._grouped_mm" not in text
    check_mixed(cm, case, NAMES, ids())
    graphs = cm.recompiles
    check_mixed(cm, case, NAMES[::-1], ids(seed=1))
    assert cm.recompiles == graphs


@pytest.mark.slow
def test_slots_of_experts_that_share_room(case: Case) -> None:
    """Adapters of a larger rank take several slots of every expert, and overwrite no other."""
    config = lorafx.LoraConfig(max_adapters=5, max_rank=4, slot_rank=2)
    cm = lorafx.compile(case.model(), config, adapters=case.folders, dynamic=False)
    store = cm._session.store
    assert [store[name].width for name in case.folders] == [2, 1, 1, 2]
    check_mixed(cm, case, NAMES, ids())
    graphs = cm.recompiles
    check_mixed(cm, case, NAMES[::-1], ids(seed=1))
    assert cm.recompiles == graphs


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4"])
def test_other_ways_to_store_and_to_dispatch(model_type: str, tmp_path: Path) -> None:
    """Transposed and interleaved weights with biases, older names, a batch of all experts."""
    other = moe_case(model_type, tmp_path)
    cm = other.compile({"lowering": "inductor"})
    with torch.no_grad():
        _, code = run_and_get_code(lambda: cm(**ids(), adapter_names=NAMES))
    assert "run_expert_delta_" in "\n".join(code)
    check_mixed(cm, other, NAMES, ids())


ROUTED = ["params", None, "older", "down", "dense"]
PINNED = {"gate_up_proj": "segments", "down_proj": "gemv"}


def plan_of(case: Case, **strategies: str) -> dict[str, str]:
    return {
        f"{path}.{name}": strategy
        for path, _ in experts_modules(case.base)
        for name, strategy in strategies.items()
    }


def chosen(cm: Any) -> dict[str, str]:
    """Strategy by name of the experts' parameter."""
    return {
        state.site.path.rpartition(".")[2]: state.strategy.partition(" ")[0]
        for record in cm._session.backend.records
        for state in record.states
        if state.site.experts > 1
    }


@pytest.mark.usefixtures("node_by_node")
def test_generated_deltas_for_every_mix_routing_and_length(case: Case, tmp_path: Path) -> None:
    options = {"lowering": "triton", "plan": plan_of(case, **PINNED), "dump": str(tmp_path)}
    cm = case.compile(options)
    check_mixed(cm, case, ROUTED, ids(5, 2))
    lowered = [path.read_text() for path in tmp_path.glob("graph-*/*-lower.py")]
    assert lowered
    assert not any("expert_slots" in text for text in lowered)  # Inductor fuses them
    assert chosen(cm) == PINNED
    graphs = cm.recompiles
    check_mixed(cm, case, ROUTED[:3], ids(3, 3, seed=4))
    same = {"input_ids": torch.full((5, 2), 7)}  # every token of a request goes the same way
    check_mixed(cm, case, ROUTED, same)
    assert cm.recompiles == graphs


def test_a_pin_for_something_else_is_refused(case: Case) -> None:
    cm = case.compile({"lowering": "triton", "plan": plan_of(case, down_proj="split")})
    with pytest.raises(Exception, match="base product is not part of the node") as raised:
        cm(**ids(5, 4), adapter_names=ROUTED)
    assert isinstance(raised.value, ConfigError) or "ConfigError" in str(raised.value)
