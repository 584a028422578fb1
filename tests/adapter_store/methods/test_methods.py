"""Adapters of other methods in one batch with LoRA and the base, against what PEFT merges."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, error, random_base
from method_files import CONFIGS, merged, save
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import config_of, inspected, load_state
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.runtime.marking import build_sites

NAMES = list(CONFIGS)


class Served:
    """One compiled model with an adapter of every method."""

    def __init__(self, root: Path) -> None:
        self.base = random_base("llama", num_hidden_layers=1)
        self.folders = {n: save(self.base, c, root / n) for n, c in CONFIGS.items()}
        self.exact: dict[str | None, nn.Module] = {None: copy.deepcopy(self.base).double()}
        config = lorafx.LoraConfig(max_rank=24, max_adapters=len(CONFIGS))
        self.cm: Any = lorafx.compile(
            self.model(), config, adapters=self.folders, dynamic=True, options=REFERENCE
        )

    def model(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def alone(self, name: str | Mapping[str, float] | None) -> nn.Module:
        if isinstance(name, Mapping):
            return self._sum(name)
        if name not in self.exact:
            self.exact[name] = merged(self.base, self.folders[name])
        return self.exact[name]

    @torch.no_grad()
    def _sum(self, weights: Mapping[str, float]) -> nn.Module:
        result = copy.deepcopy(self.exact[None])
        bases = dict(self.exact[None].named_parameters())
        others = {name: dict(self.alone(name).named_parameters()) for name in weights}
        for path, parameter in result.named_parameters():
            for name, weight in weights.items():
                parameter += weight * (others[name][path] - bases[path])
        return result

    def check(self, names: Sequence[Any]) -> None:
        torch.manual_seed(len(names))
        ids = torch.randint(0, 60, (len(names), 6))
        got = self.cm(ids, adapter_names=names).logits
        with torch.no_grad():
            want = torch.cat([self.alone(n)(ids[i : i + 1]).logits for i, n in enumerate(names)])
            base = self.exact[None](ids).logits
        for row, name in enumerate(names):
            assert error(got[row].double(), want[row]) <= TOLERANCE, name
            assert name is None or error(want[row], base[row]) > 1000 * TOLERANCE, name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("methods"))


def test_every_method_in_mixed_batches_of_one_graph(served: Served) -> None:
    served.check([NAMES[1], None, "lora", NAMES[2]])
    captured = served.cm.recompiles
    for first, second in zip(NAMES[3::2], [*NAMES[4::2], "lokr"], strict=False):
        served.check([None, first, "lora", second])
    served.check(["pvera", "bdlora", "miss", "loha"])
    assert served.cm.recompiles == captured


def test_sums(served: Served) -> None:
    served.check([{"loha": 0.7, "lora": 0.3}, None, {"lokr": -0.5, "miss": 1.5}, "lora"])


@pytest.mark.usefixtures("in_eager_mode")
def test_generated_tokens_are_those_of_the_merged_models(served: Served) -> None:
    cm: Any = lorafx.compile(served.model(), served.folders, options=REFERENCE)
    ids = torch.tensor([[3, 5, 7], [3, 5, 7], [2, 4, 6]])
    names = ["loha", None, "lokr"]
    got = cm.generate(ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names):
        alone: Any = served.alone(name)
        want = alone.generate(ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(got[row, : want.shape[1]], want[0])  # which may end before the others


def test_merged_and_taken_back(served: Served) -> None:
    ids = torch.arange(8).reshape(2, 4)
    before = served.cm(ids).logits
    served.cm.merge("lokr")
    got = served.cm(ids).logits
    served.cm.unmerge()
    with torch.no_grad():
        assert error(got.double(), served.alone("lokr")(ids).logits) <= TOLERANCE
    assert torch.equal(served.cm(ids).logits, before)


def test_what_they_take_is_shown(served: Served) -> None:
    state = inspected(served.folders["loha"])
    sizes = {row.path.rpartition(".")[2]: row.sizes.rank for row in state.modules}
    assert sizes == {"q_proj": 9, "v_proj": 4, "down_proj": 4, "gate_proj": 4}
    assert any("LoHa" in feature for feature in state.features)
    assert config_of(served.folders["loha"]).max_rank == 9
    assert "rank 9" in str(served.cm.explain())


def test_a_rank_over_the_banks_is_told_with_the_setting(served: Served) -> None:
    config = lorafx.LoraConfig(max_rank=4, target_modules=["q_proj", "v_proj"])
    cm = lorafx.compile(served.model(), config)
    with pytest.raises(lorafx.CapacityError, match=r"rank 9 is over max_rank = 4.*max_rank=9"):
        cm.load_adapter(_only(served.folders["loha"], "q_proj", "v_proj"), "loha")
    assert cm.adapters == ()


def _only(folder: Path, *names: str) -> lorafx.AdapterSource:
    return lorafx.AdapterSource(folder, ignore=[rf"\.(?!{'|'.join(names)})\w+_proj\."])


@torch.no_grad()
@pytest.mark.parametrize("targets", [["embed_tokens"], "model.embed_tokens"])
def test_trained_tokens_alone(served: Served, targets: Any, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(
        token_indices=[3, 5], target_modules=targets, init_weights=False
    )
    wrapped: Any = peft.get_peft_model(served.model(), config).eval()
    wrapped.save_pretrained(str(tmp_path))
    cm: Any = lorafx.compile(served.model(), adapters={"a": tmp_path})
    ids = torch.tensor([[1, 3, 5, 7]])
    got, want = cm(ids, adapter_names=["a"]).logits, wrapped(ids).logits
    assert error(got, want) <= TOLERANCE < error(want, served.base(ids).logits)


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


def test_drawn_projections_are_those_of_all_targets(served: Served) -> None:
    """PEFT draws them for down_proj too, the widest, which is left out here."""
    folder, base = served.folders["vera drawn"], served.model()
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
def test_names_of_another_place_keep_their_patterns(served: Served, name: str) -> None:
    saved = load_file(served.folders[name] / "adapter_model.safetensors")
    moved = {key.replace("model.model.layers", "model.text.layers"): t for key, t in saved.items()}
    source = lorafx.AdapterSource(moved, config=CONFIGS[name], prefix=("text", "model"))
    got, want = load_state(source, served.base), load_state(served.folders[name], served.base)
    plain = {key.removeprefix("base_model.model."): t for key, t in want.tensors.items()}
    assert got.scales == want.scales
    assert got.tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in got.tensors.items())


def test_bfloat16_factors_are_read_exactly(served: Served) -> None:
    saved = load_file(served.folders["loha"] / "adapter_model.safetensors")
    halved = {key: tensor.bfloat16() for key, tensor in saved.items()}
    config = CONFIGS["loha"]
    state = load_state(lorafx.AdapterSource(halved, config=config), served.base)

    def delta(path: str) -> tuple[Tensor, Tensor]:
        pair = [state.tensors[f"{path}.lora_{letter}.weight"] for letter in "BA"]
        w = [halved[f"base_model.model.{path}.hada_w{i}_{x}"].double() for i in "12" for x in "ab"]
        return pair[0].double() @ pair[1].double(), (w[0] @ w[1]) * (w[2] @ w[3])

    got, want = delta("model.layers.0.mlp.down_proj")
    assert error(got, want) <= 1e-12
