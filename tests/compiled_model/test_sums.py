"""Sums of adapters and adapters at a scale, beside plain ones and base rows, against W + Σ w ΔW."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from dense_merge import TOLERANCE, build_case, check_mixed, error, random_base, save_adapter
from dora_cases import family_case
from expert_models import ids, moe_case
from own_weights import own_case
from step_logits import greedy
from sums import SumCase
from tiny_models import FAMILIES, token_inputs
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.errors import BatchError, CapacityError, ConfigError, UnknownAdapterError

FIXED = {"pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 4, "max_new_tokens": 4}
PAGES = ContinuousBatchingConfig(page_size=4, num_blocks=256, max_batch_tokens=48)
MIX = {"a0": 0.7, "a1": 0.3}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> SumCase:
    """A Llama of one layer with two adapters of its embedding, one of them by rsLoRA."""
    folder = tmp_path_factory.mktemp("sums")
    made = SumCase.of(build_case("llama", folder))
    made.folders["rs"] = save_adapter(
        made.base,
        folder / "rs",
        rank=4,
        targets=["embed_tokens", "q_proj", "o_proj"],
        seed=9,
        use_rslora=True,
    )
    return made


@pytest.fixture(scope="module")
def served(case: SumCase) -> Any:
    """One compiled model for the module: its graphs are shared as in use."""
    return case.with_room()


def feed(rows: int, length: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    return token_inputs(rows, length)


def test_mixed_batches_need_no_graph_for_new_weights(case: SumCase, served: Any) -> None:
    names = [MIX, None, "a1", {"a3": 0.5, "rs": -1.25}, {"a1": 0.5}]
    check_mixed(served, case, names, feed(5))
    captured, banks = served.recompiles, served.memory()["banks"]
    check_mixed(served, case, [{"a0": 0.2, "a1": 1.5}, None, "a0", {"rs": 2.0}, "a3"], feed(5))
    four = {"a0": 1, "a1": np.float32(-0.5), "a2": 0.25, "rs": 0.0, "a4": 1.0}
    check_mixed(served, case, [four, {"a1": 3}, MIX, dict(reversed(MIX.items())), None], feed(5))
    check_mixed(served, case, [MIX] * 5, feed(5))
    assert served.recompiles == captured
    assert served.memory()["banks"] == banks
    assert served.adapters == ("a0", "a1", "a2", "a3", "a4", "rs")
    assert "0.7·a0" not in str(served.explain())


def test_a_weight_of_one_is_the_adapter_and_of_zero_the_base(case: SumCase, served: Any) -> None:
    inputs = feed(4)
    plain = served(**inputs, adapter_names=["a0", "a0", None, None]).logits
    names = [{"a0": 1.0}, {"a0": 1, "a1": 0}, {"a0": 0.0}, {"a0": 0, "a1": -0.0}]
    assert error(served(**inputs, adapter_names=names).logits, plain) <= TOLERANCE


def test_parts_of_packed_projections(case_of: Any) -> None:
    case = SumCase.of(case_of("phi3"))
    names = [{"a0": 0.7, "a1": -0.4}, None, {"a2": 0.5, "a1": 0.5, "a4": 2.0}, "a0"]
    check_mixed(case.with_room(), case, names, feed(4))


def test_as_peft_joins_adapters(case: SumCase, served: Any) -> None:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(case.base), case.folders["a0"], "a0")
    model.load_adapter(case.folders["a1"], "a1")
    model.add_weighted_adapter(["a0", "a1"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    inputs = feed(2)
    want = model.eval()(**inputs).logits
    assert error(served(**inputs, adapter_names=[MIX, MIX]).logits, want) <= TOLERANCE


def test_routed_experts(tmp_path: Path) -> None:
    case = SumCase.of(moe_case("qwen3_moe", tmp_path))
    names = [{"params": 0.7, "older": 0.4}, None, {"older": -0.5}, "down", {"down": 1, "older": 2}]
    cm = case.with_room()
    check_mixed(cm, case, names, ids())
    captured = cm.recompiles
    every = dict.fromkeys(case.folders, 0.5)
    names = ["older", {"params": 0.1, "down": 0.9}, "params", None, every]
    check_mixed(cm, case, names, ids(seed=2))
    assert cm.recompiles == captured


def test_generated_tokens(in_eager_mode: None, case: SumCase) -> None:
    served: Any = case.with_room()
    names, inputs = [MIX, None, "a3", {"a1": 2.0}], feed(4)
    for more in ({}, {"num_beams": 2}):
        got = served.generate(**inputs, **FIXED, do_sample=False, **more, adapter_names=names)
        rows = [
            case.alone(name).generate(
                **{key: value[row : row + 1] for key, value in inputs.items()},
                **FIXED,
                do_sample=False,
                **more,
            )
            for row, name in enumerate(names)
        ]
        assert torch.equal(got, torch.cat(rows))


def test_the_default(case: SumCase, served: Any) -> None:
    inputs = feed(2)
    served.set_adapter(MIX)
    try:
        assert error(served(**inputs).logits, case.expected([MIX, MIX], inputs)) <= TOLERANCE
        with pytest.raises(ConfigError, match=r"'0.7·a0 \+ 0.3·a1' is in use"):
            served.merge("a0")
        with pytest.raises(UnknownAdapterError, match="'b0'; nearest: a0"):
            served.set_adapter({"b0": 0.5})
        for act in (served.pin_adapter, served.unload_adapter):
            with pytest.raises(ConfigError, match="weights by name are for calls"):
                act(MIX)
        assert error(served(**inputs).logits, case.expected([MIX, MIX], inputs)) <= TOLERANCE
    finally:
        served.set_adapter(None)


def test_a_sum_follows_its_adapters(case: SumCase) -> None:
    cm = case.with_room(max_adapters=3)
    inputs, host = feed(3), cm.memory()["host"]
    check_mixed(cm, case, [MIX, "a1", None], inputs)
    captured = cm.recompiles
    assert cm.memory()["host"] > host
    cm.load_adapter(case.folders["a2"], "a0")
    changed = SumCase(case.base, {**case.folders, "a0": case.folders["a2"]})
    check_mixed(cm, changed, [MIX, "a1", {"a0": 0.5}], inputs)
    for weight in range(1, 9):  # takes slots in turn, and host memory for a few
        check_mixed(cm, changed, [{"a0": weight / 10, "a1": 1.0}, "a1", "a2"], inputs)
    assert len(cm._session.store._adapters) <= len(case.folders) + 2 * 3
    cm.set_adapter(MIX)
    cm.unload_adapter("a0")
    with pytest.raises(UnknownAdapterError, match="'a0'"):
        cm(**inputs, adapter_names=[MIX, None, None])
    assert torch.equal(cm(**inputs).logits, cm(**inputs, adapter_names=[None] * 3).logits)
    check_mixed(cm, changed, ["a1", {"a3": 0.5}, None], inputs)
    cm.unload_adapter("a3")
    assert cm.recompiles == captured + 1  # the base's
    cm.load_adapter(case.folders["a0"], "a0")
    cm.load_adapter(case.folders["a3"], "a3")
    assert cm.memory()["host"] == host
    check_mixed(cm, case, [MIX, {"a3": 2.0}, "a0"], inputs)


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_members_of_a_running_call_stay(start: str, case: SumCase, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORAFX_START", start)
    served: Any = case.with_room()
    raised = []

    def stream(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for act in (
            lambda: served.unload_adapter("a0"),
            lambda: served.load_adapter(case.folders["a2"], "a0"),
        ):
            with pytest.raises(BatchError, match="serves 'a0'") as found:
                act()
            raised.append(found)
        return scores

    served.generate(
        **feed(2), **FIXED, adapter_names=[MIX, None], logits_processor=[stream], do_sample=False
    )
    assert len(raised) == 8


def test_too_large_a_rank(case: SumCase) -> None:
    cm = case.compile()  # room for the largest of its adapters, 8
    inputs = feed(2)
    check_mixed(cm, case, [MIX, {"a3": 0.5}], inputs)  # 2 + 5
    before = cm._session.store.resident, cm.memory()["banks"], cm.recompiles
    with pytest.raises(
        CapacityError, match=r"'1·a1 \+ 0.5·a3' .* 5 \+ 8 = 13 at .* holds 8; .*max_rank=13\)"
    ):
        cm(**inputs, adapter_names=[{"a1": 1, "a3": 0.5}, None])
    assert (cm._session.store.resident, cm.memory()["banks"], cm.recompiles) == before
    check_mixed(cm, case, [{"a3": 0.5, "a4": 1.0}, MIX], inputs)  # at different sites


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({}, ConfigError, r"adapter_names\[1\] is an empty mapping"),
        ({"a0": math.nan}, ConfigError, "'a0' the weight nan"),
        ({"a0": 10**400}, ConfigError, "'a0' the weight 1000"),
        ({"a0": True}, ConfigError, "'a0' the weight True"),
        ({"a0": 1e300}, ConfigError, "beyond the range of float32"),
        ({"a0": 0.5, "__base__": 0.5}, ConfigError, "gives the base model a weight"),
        ({"a0": 0.5, 3: 0.5}, ConfigError, "3 among its names"),
        ({"a0": 0.5, "rss": 0.0}, UnknownAdapterError, "'rss'; nearest: rs"),
        ([("a0", 0.5)], ConfigError, r"adapter_names\[1\] is \[.*mapping of names to weights"),
    ],
)
def test_what_is_no_sum(served: Any, given: Any, kind: type[Exception], said: str) -> None:
    before = served._session.store.resident, served.memory(), served.recompiles
    with pytest.raises(kind, match=said):
        served(**feed(2), adapter_names=["a1", given])
    assert (served._session.store.resident, served.memory(), served.recompiles) == before


@pytest.mark.usefixtures("road")
def test_what_is_not_linear_in_a_weight(tmp_path: Path) -> None:
    dora = SumCase.of(family_case("plain", tmp_path / "dora"))
    cm, inputs = dora.compile(), FAMILIES["plain"].inputs(3, 4)
    for mix in ({"d0": 0.5}, {"p2": 1.0, "d0": 1.0}):
        with pytest.raises(ConfigError, match=r"'d0' is a DoRA adapter.*name it alone"):
            cm(**inputs, adapter_names=[mix, None, "p2"])
    names = [{"d0": 1.0, "p2": 0.0}, {"p2": 0.5}, "d1"]
    want = dora.expected(["d0", {"p2": 0.5}, "d1"], inputs)
    assert error(cm(**inputs, adapter_names=names)["logits"], want) <= TOLERANCE

    qv = ["q_proj", "v_proj"]
    configs = {
        "own": {"target_modules": qv, "modules_to_save": ["lm_head"]},
        "tokens": {"target_modules": qv, "trainable_token_indices": [3, 5]},
        "low": {"target_modules": qv, "r": 3},
    }
    base = random_base("llama")
    own = SumCase.of(own_case(base, tmp_path / "own", configs))
    cm, inputs = own.compile(), feed(3)
    for name in ("own", "tokens"):
        for mix in ({name: 0.5}, {name: 1.0, "low": 1.0}):
            with pytest.raises(ConfigError, match=f"'{name}' has weights of its own"):
                cm(**inputs, adapter_names=[mix, None, "low"])
    check_mixed(cm, own, [{"own": 1.0, "low": 0.0}, {"low": 0.5}, "tokens"], inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("earlier_objects_frozen")
def test_continuous_batching_with_more_sums_than_slots(case: SumCase) -> None:
    cm = case.with_room(max_adapters=2)
    names = [MIX, {"a1": 0.5}, None, {"a0": -1.0, "a3": 1.0}, "a2", {"rs": 2.0, "a0": 1.0}]
    prompts = [[3 + row, 4, 5, 6] for row in range(len(names))]
    outputs = cm.generate_batch(prompts, names, continuous_batching_config=PAGES, max_new_tokens=4)
    for name, prompt, output in zip(names, prompts, outputs.values(), strict=True):
        assert output.error is None, output.error
        assert [*prompt, *output.generated_tokens] == greedy(case, name, prompt, 4)
    assert cm.stats().tokens["__sums__"] >= sum(isinstance(name, dict) for name in names) * 4
    with pytest.raises(ConfigError, match="empty mapping"):
        cm.generate_batch(prompts[:1], adapter_names=[{}])
