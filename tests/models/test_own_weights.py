"""Adapters with weights of their own for whole modules, or for some tokens, beside plain ones and
base rows, against PEFT's own merge of each row."""

from __future__ import annotations

import copy
import json
from typing import Any

import oracle
import peft
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error, random_base, save_adapter
from own_weights import own_case, save_own
from safetensors.torch import load_file, save_file
from step_logits import StepLogits, answers, check_logits
from tiny_models import token_inputs
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx
from lorafx import LoraConfig
from lorafx.errors import CapacityError, UnsupportedAdapterError

QV = ["q_proj", "v_proj"]
CAUSAL = {
    "both": {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "lora": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
    "tokens": {
        "target_modules": QV,
        "trainable_token_indices": {"embed_tokens": [3, 5, 9, 60], "lm_head": [4, 40]},
    },
}
NAMES = ["both", None, "tokens", "lora", "head", "both", None]
MIXES = (NAMES[::-1], ["head", "head", "tokens", "tokens", "both", "lora", "lora"], [None] * 7)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = random_base("llama")
    return own_case(base, tmp_path_factory.mktemp("own"), CAUSAL)


@pytest.fixture(scope="module")
def served(case: Case) -> Any:
    return case.compile(dynamic=True)


def inputs(rows: int = len(NAMES), length: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows + length)
    found = token_inputs(rows, length)
    found["input_ids"][:, 3] = 5  # a token that "tokens" has a row for
    return found


def graphs(cm: Any) -> int:
    return len(cm._session.backend.records)


# Batches
def test_mixes_and_new_adapters_recompile_nothing(case, served, tmp_path):
    check_mixed(served, case, NAMES, inputs())
    before = graphs(served)
    for length, names in enumerate(MIXES, 5):
        check_mixed(served, case, names, inputs(length=length))
    folder = save_own(case.base, tmp_path / "b", seed=9, r=2, **CAUSAL["both"])
    served.load_adapter(str(folder), "later")
    later = Case(case.base, {**case.folders, "later": folder})
    check_mixed(served, later, ["later", "both", None, "later", "lora", "tokens", "head"], inputs())
    served.unload_adapter("later")
    check_mixed(served, case, NAMES, inputs())
    assert graphs(served) - before <= 1  # calls without an adapter have a graph of their own


def test_base_and_plain_rows_keep_their_bits(served):
    x = inputs()
    mixed = served(**x, adapter_names=NAMES)["logits"]
    names = [name if name == "lora" else None for name in NAMES]
    alone = served(**x, adapter_names=names)["logits"]
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone[row]) == (NAMES[row] == name)


@pytest.mark.slow
def test_in_inductors_code(case):
    cm = case.compile({"lowering": "inductor"})
    for names in (NAMES, MIXES[0]):
        check_mixed(cm, case, names, inputs())


def test_adapters_take_turns(in_eager_mode, case):
    """Three slots, and room for weights of one adapter's own."""
    config = LoraConfig(
        ["q_proj", "v_proj", "k_proj", "o_proj"],
        max_adapters=3,
        max_own_weights=1,
        modules_to_save=["lm_head", "embed_tokens"],
    )
    folders = {name: case.folders[name] for name in ("both", "head", "tokens")}
    plain = save_plain(case)
    cm = lorafx.compile(case.model(), config, adapters={**folders, **plain}, options=REFERENCE)
    known = Case(case.base, {**case.folders, **plain})
    store = cm._session.store
    for names in (
        ["both", "p0"],
        ["head", None],
        ["p1", "p0"],
        ["tokens", "p1"],
        ["p0", "p1"],
        ["both", None],
    ):
        check_mixed(cm, known, names, inputs(2))
    with pytest.raises(CapacityError, match=r"own weights of head: .*\(max_own_weights=2\)"):
        cm(**inputs(2), adapter_names=["both", "head"])
    check_mixed(cm, known, ["both", "p1"], inputs(2))
    cm.load_adapter(str(case.folders["head"]), "both")  # in place, where the old one lies
    check_mixed(cm, Case(case.base, {**folders, "both": folders["head"]}), ["both"], inputs(1))
    cm.pin_adapter("p0")
    with pytest.raises(CapacityError, match="'p0' is pinned, and there is no room"):
        cm.load_adapter(str(case.folders["head"]), "p0")
    cm.load_adapter(str(case.folders["tokens"]), "p1")  # is given a slot again by a batch
    assert "p1" not in store.resident
    moved = Case(case.base, {**known.folders, "p1": folders["tokens"]})
    check_mixed(cm, moved, ["p1", "p0", None], inputs(3))
    assert "both" not in store.resident


def save_plain(case: Case) -> dict[str, Any]:
    folder = case.folders["both"].parent
    return {
        f"p{seed}": save_own(case.base, folder / f"p{seed}", seed=seed, r=2, target_modules=QV)
        for seed in range(2)
    }


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_trained_tokens_get_the_delta_of_their_module(start, case, tmp_path):
    """Which PEFT does not train, but whose files can be joined."""
    state = load_file(case.folders["lora"] / "adapter_model.safetensors")
    rows, tokens = torch.randn(2, 24), [40, 4]
    state["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] = rows
    config = json.loads((case.folders["lora"] / "adapter_config.json").read_text())
    both = config | {"trainable_token_indices": {"lm_head": tokens}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(both))
    save_file(state, tmp_path / "adapter_model.safetensors")
    want = copy.deepcopy(case.alone("lora"))
    with torch.no_grad():
        want.lm_head.weight[tokens] += rows - case.base.lm_head.weight[tokens]
    cm = lorafx.compile(case.model(), {"a": tmp_path}, options={**REFERENCE, "start": start})
    x = inputs(2)
    got = cm(**x, adapter_names=["a", None])["logits"]
    assert error(got[:1], want(**oracle.one_row(x, 0))["logits"]) <= TOLERANCE
    assert error(got[1:], case.expected([None], oracle.one_row(x, 1))) <= TOLERANCE


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("earlier_objects_frozen")
def test_continuous_batching(start, case):
    served = case.compile({"start": start})
    config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=32)
    with served.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)
        asked = {
            engine.add_request(
                inputs(1, length)["input_ids"][0].tolist(), adapter=name, max_new_tokens=3
            ): name
            for length, name in enumerate(("both", None, "tokens", "head", "lora"), 5)
        }
        outputs = answers(engine, list(asked))
    check_logits(case, seen, outputs, asked)


# PEFT models
def test_a_peft_model_that_is_taken_over(in_eager_mode, case):
    wrapped = peft.PeftModel.from_pretrained(case.model(), str(case.folders["both"]), "both")
    wrapped.load_adapter(str(case.folders["head"]), "head")
    names = set(dict(wrapped.named_modules()))
    cm = lorafx.compile(wrapped.eval(), options=REFERENCE)
    assert isinstance(cm._orig_mod.lm_head, torch.nn.Linear)
    check_mixed(cm, case, ["head", "both", None], inputs(3))
    cm.detach()
    assert set(dict(wrapped.named_modules())) == names
    wrapped.set_adapter("head")
    with torch.no_grad():
        got = wrapped(**inputs(2))["logits"]
    assert error(got, case.expected(["head"] * 2, inputs(2))) <= TOLERANCE


# What is refused
def test_modules_of_other_kinds_are_refused_by_name(case, tmp_path):
    saved = {"target_modules": QV, "modules_to_save": ["model.norm"]}
    folder = save_own(case.base, tmp_path / "n", seed=1, r=2, **saved)
    with pytest.raises(
        UnsupportedAdapterError, match=r"model\.norm \(LlamaRMSNorm\) was trained as a whole"
    ):
        lorafx.compile(case.model(), {"n": folder})


def test_no_room(in_eager_mode, case):
    config = LoraConfig([*QV, "k_proj", "o_proj", "embed_tokens", "lm_head"])
    lora = {"lora": case.folders["lora"]}
    cm = lorafx.compile(case.model(), config, adapters=lora, options=REFERENCE)
    with pytest.raises(CapacityError, match=r"LoraConfig\(modules_to_save=\['lm_head'\]\)"):
        cm.load_adapter(str(case.folders["head"]), "head")
    with pytest.raises(CapacityError, match=r"trainable_tokens=\{'.*embed_tokens': 4\}"):
        cm.load_adapter(str(case.folders["tokens"]), "tokens")
    check_mixed(cm, case, ["lora", None], inputs(2))


def test_settings_that_name_nothing(case):
    with pytest.raises(lorafx.TargetError, match=r"entry 'lm_haed' names no module.*lm_head"):
        lorafx.compile(case.model(), LoraConfig(QV, modules_to_save=["lm_haed"]))
    with pytest.raises(lorafx.TargetError, match=r"norm \(LlamaRMSNorm\) cannot have a weight"):
        lorafx.compile(case.model(), LoraConfig(QV, modules_to_save=["model.norm"]))
    with pytest.raises(lorafx.ConfigError, match="list of module names"):
        LoraConfig(QV, modules_to_save="lm_head")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("own")
    base = random_base("llama")
    plan = {"target_modules": QV, "modules_to_save": ["lm_head"]}
    found = own_case(base, folder, {"first": plan, "second": plan})
    found.folders["plain"] = save_adapter(base, folder / "plain", rank=2, targets=QV)
    return found


def compiled(case: Case, **options: str) -> lorafx.CompiledModel:
    config = lorafx.LoraConfig(
        [*QV, "lm_head"], modules_to_save=["lm_head"], max_adapters=3, max_own_weights=1
    )
    return lorafx.compile(
        case.model(), config, adapters=case.folders, options={**REFERENCE, **options}
    )


def test_a_sum_that_is_one_adapter_counts_before_it_is_made(in_eager_mode: None, narrow) -> None:
    cm = compiled(narrow, overflow="waves")
    torch.manual_seed(0)
    inputs = token_inputs(4, 5)
    alone = {"first": 1.0, "plain": 0.0}
    got = cm(**inputs, adapter_names=[alone, "second", alone, "second"]).logits
    want = cm(**inputs, adapter_names=["first", "second", "first", "second"]).logits
    assert torch.equal(got, want)
    check_mixed(cm, narrow, ["first", "second", "plain", None], inputs)
    cm = compiled(narrow)
    with pytest.raises(CapacityError, match="own weights"):
        cm(**inputs, adapter_names=[alone, "second", None, None])


@pytest.mark.usefixtures("earlier_objects_frozen", "in_eager_mode")
def test_requests_of_an_engine_take_turns(narrow) -> None:
    cm = compiled(narrow)
    config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=24)
    work = [([3 + i, 4, 5], name) for i, name in enumerate(["first", "second", None, "plain"] * 2)]
    with cm.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)
        ids = [engine.add_request(p, adapter=a, max_new_tokens=3) for p, a in work]
        outputs = answers(engine, ids)
    check_logits(narrow, seen, outputs, dict(zip(ids, (a for _, a in work), strict=True)))
