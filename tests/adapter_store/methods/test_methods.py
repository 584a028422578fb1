"""Adapters of other methods in one batch with LoRA and the base, against what PEFT merges."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, check_mixed, error
from method_files import CONFIGS, MethodCase
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import config_of, inspected, load_state
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.runtime.marking import build_sites

pytestmark = pytest.mark.any_sizes

NAMES = list(CONFIGS)


IDS = torch.randint(0, 60, (4, 6), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> MethodCase:
    return MethodCase.of_configs("llama", CONFIGS, tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def cm(case: MethodCase) -> Any:
    """One compiled model with an adapter of every method."""
    return case.with_room(max_rank=24, max_adapters=len(CONFIGS))


def test_every_method_in_mixed_batches_of_one_graph(case: MethodCase, cm: Any) -> None:
    inputs, captured = {"input_ids": IDS}, []
    batches = [[NAMES[1], None, "lora", NAMES[2]], ["pvera", "bdlora", "miss", "loha"]]
    pairs = zip(NAMES[3::2], [*NAMES[4::2], "lokr"], strict=False)
    for names in (*batches, *([None, first, "lora", second] for first, second in pairs)):
        check_mixed(cm, case, names, inputs)
        captured.append(cm.recompiles)
    assert captured[0] == captured[-1]


def test_sums(case: MethodCase, cm: Any) -> None:
    names: list[Any] = [{"loha": 0.7, "lora": 0.3}, None, {"lokr": -0.5, "miss": 1.5}, "lora"]
    check_mixed(cm, case, names, {"input_ids": IDS})


def test_what_they_take_is_shown(case: MethodCase, cm: Any) -> None:
    state = inspected(case.folders["loha"])
    sizes = {row.path.rpartition(".")[2]: row.sizes.rank for row in state.modules}
    assert sizes == {"q_proj": 9, "v_proj": 4, "down_proj": 4, "gate_proj": 4}
    assert any("LoHa" in feature for feature in state.features)
    assert config_of(case.folders["loha"]).max_rank == 9
    assert {row.sizes.rank for row in inspected(case.folders["vera"]).modules} == {4}
    assert "rank 9" in str(cm.explain())


def test_a_rank_over_the_banks_is_told_with_the_setting(case: MethodCase) -> None:
    config = lorafx.LoraConfig(max_rank=4, target_modules=["q_proj", "v_proj"])
    cm = lorafx.compile(case.model(), config)
    with pytest.raises(lorafx.CapacityError, match=r"rank 9 is over max_rank = 4.*max_rank=9"):
        cm.load_adapter(_only(case.folders["loha"], "q_proj", "v_proj"), "loha")
    assert cm.adapters == ()


def _only(folder: Path, *names: str) -> lorafx.AdapterSource:
    return lorafx.AdapterSource(folder, ignore=[rf"\.(?!{'|'.join(names)})\w+_proj\."])


@torch.no_grad()
@pytest.mark.parametrize("targets", [["embed_tokens"], "model.embed_tokens"])
def test_trained_tokens_alone(case: MethodCase, targets: Any, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(
        token_indices=[3, 5], target_modules=targets, init_weights=False
    )
    wrapped: Any = peft.get_peft_model(case.model(), config).eval()
    wrapped.save_pretrained(str(tmp_path))
    cm: Any = lorafx.compile(
        case.model(), adapters={"a": tmp_path}, options=REFERENCE, dynamic=False
    )
    ids = torch.tensor([[1, 3, 5, 7]])
    got, want = cm(ids, adapter_names=["a"]).logits, wrapped(ids).logits
    assert error(got, want) <= TOLERANCE < error(want, case.base(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("pooled", [True, False])
def test_qalora_is_what_its_forward_computes(pooled: bool) -> None:
    """By PEFT's own variant, which it has for layers of GPTQ alone; others have whole factors."""
    base = nn.Sequential(nn.Linear(12, 10))
    a, b = torch.randn(2, 3 if pooled else 12), torch.randn(10, 2)
    factors = {"0.lora_A.weight": a, "0.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"]}
    source = lorafx.AdapterSource(
        factors, config={**config, "use_qalora": True, "qalora_group_size": 4}
    )
    cm: Any = lorafx.compile(copy.deepcopy(base), adapters={"a": source})
    x = torch.randn(5, 12)
    layer: Any = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=a)},
        lora_B={"a": SimpleNamespace(weight=b)},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": 3.0},
        qalora_group_size={"a": 4},
        training=False,
        in_features=12,
    )
    of_peft = QALoraLinearVariant.forward(layer, "a", x, base(x)) if pooled else None
    want = base(x) + 3 * x @ a.T @ b.T if of_peft is None else of_peft
    torch.testing.assert_close(cm(x, adapter_names=["a"] * 5), want, rtol=1e-4, atol=1e-4)


def test_drawn_projections_are_those_of_all_targets(case: MethodCase) -> None:
    """PEFT draws them for down_proj too, the widest, which is left out here."""
    folder, base = case.folders["vera drawn"], case.model()
    _, sites = build_sites(base, lorafx.LoraConfig(target_modules="all-linear"))
    whole, part = (
        read_adapter(source, "a", sites, model=base, max_rank=64, warn=False).weights
        for source in (folder, _only(folder, "q_proj"))
    )
    ((path, of_part),) = part.items()
    assert torch.equal(of_part.A, whole[path].A)
    assert torch.equal(of_part.B, whole[path].B)
    rank = inspected(folder).modules[0].sizes.rank
    assert rank == 4


@pytest.mark.parametrize("name", ["loha", "miss", "bdlora"])
def test_names_of_another_place_keep_their_patterns(case: MethodCase, name: str) -> None:
    saved = load_file(case.folders[name] / "adapter_model.safetensors")
    moved = {key.replace("model.model.layers", "model.text.layers"): t for key, t in saved.items()}
    source = lorafx.AdapterSource(moved, config=CONFIGS[name], prefix=("text", "model"))
    got, want = load_state(source, case.base), load_state(case.folders[name], case.base)
    plain = {key.removeprefix("base_model.model."): t for key, t in want.tensors.items()}
    assert got.scales == want.scales
    assert got.tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in got.tensors.items())


def test_bfloat16_factors_are_read_exactly(case: MethodCase) -> None:
    saved = load_file(case.folders["loha"] / "adapter_model.safetensors")
    halved = {key: tensor.bfloat16() for key, tensor in saved.items()}
    config = CONFIGS["loha"]
    state = load_state(lorafx.AdapterSource(halved, config=config), case.base)

    def delta(path: str) -> tuple[Tensor, Tensor]:
        pair = [state.tensors[f"{path}.lora_{letter}.weight"] for letter in "BA"]
        w = [halved[f"base_model.model.{path}.hada_w{i}_{x}"].double() for i in "12" for x in "ab"]
        return pair[0].double() @ pair[1].double(), (w[0] @ w[1]) * (w[2] @ w[3])

    got, want = delta("model.layers.0.mlp.down_proj")
    assert error(got, want) <= 1e-12
