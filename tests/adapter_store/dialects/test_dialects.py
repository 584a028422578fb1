"""Adapters in every dialect, in one batch against dense merges; what each says in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, random_base, save_adapter
from dialect_files import WRITERS, alpha, as_kohya, factors, source
from expert_files import Model as ExpertModel
from safetensors.torch import load_file, save, save_file
from tiny_models import token_inputs
from torch import nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, ConfigError, UnsupportedAdapterError
from lorafx.runtime.marking import build_sites

DIALECTS = sorted(WRITERS)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapters of unequal ranks and scales, one for each dialect, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("peft")
    base = random_base("llama")
    targets = {"mlx": ["embed_tokens", "q_proj", "up_proj"], "loralib": ["embed_tokens", "o_proj"]}
    return Case(
        base,
        {
            name: save_adapter(
                base,
                folder / name,
                rank=2 + seed,
                targets=targets.get(name, ["q_proj", "down_proj"]),
                seed=seed,
                lora_alpha=3 + seed,
            )
            for seed, name in enumerate(DIALECTS)
        },
    )


pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def written(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    suffix = {"kohya": ".safetensors", "diffusers": ".safetensors", "loralib": ".pt"}
    return {
        name: WRITERS[name](case.folders[name], folder / f"{name}{suffix.get(name, '')}")
        for name in DIALECTS
    }


@pytest.fixture(scope="module")
def compiled(case: Case, written: dict[str, Path]):
    adapters = {name: source(name, case.folders[name], file) for name, file in written.items()}
    return lorafx.compile(case.model(), adapters, options={**REFERENCE, "start": "eager"})


@pytest.mark.usefixtures("in_eager_mode")
def test_a_batch_of_all_dialects_is_that_of_dense_merges(case: Case, compiled) -> None:
    check_mixed(compiled, case, [*DIALECTS, None], token_inputs(len(DIALECTS) + 1, 7))
    check_mixed(compiled, case, ["kohya"], token_inputs(1, 7))
    check_mixed(compiled, case, ["mlx", None, "peft"], token_inputs(3, 5))


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_told_by_its_keys_and_may_be_forced(
    name: str, case: Case, written: dict[str, Path]
) -> None:
    told = load_state(source(name, case.folders[name], written[name]), case.base)
    assert told.dialect == name
    asked = source(name, case.folders[name], written[name])
    forced = load_state(
        lorafx.AdapterSource(asked.source, config=asked.config, dialect=name), case.base
    )
    assert forced.tensors.keys() == told.tensors.keys()


@pytest.mark.usefixtures("in_eager_mode")
def test_what_load_adapter_takes_in_memory_and_as_bytes(case: Case, compiled, written) -> None:
    held = load_file(written["kohya"])
    for given_as in (held, save(held), written["kohya"].read_bytes()):
        compiled.load_adapter(given_as, "kohya")
        check_mixed(compiled, case, ["kohya", None], token_inputs(2, 4))
    content = written["loralib"].read_bytes()
    config = {"lora_alpha": alpha(case.folders["loralib"])}
    compiled.load_adapter(lorafx.AdapterSource(content, config=config), "loralib")
    check_mixed(compiled, case, ["loralib", None], token_inputs(2, 4))


def test_an_unknown_dialect_names_the_known_ones(case: Case, written) -> None:
    with pytest.raises(ConfigError, match=r"no dialect 'koya'; nearest: kohya"):
        load_state(lorafx.AdapterSource(written["kohya"], dialect="koya"), case.base)


def test_kohya_of_two_components(case: Case, tmp_path: Path) -> None:
    folder = case.folders["kohya"]
    unet = load_file(as_kohya(folder, tmp_path / "unet.safetensors"))
    text = {
        k.replace("lora_unet_", "lora_te_").replace("model", "other"): t for k, t in unet.items()
    }
    state = load_state({**unet, **text}, case.base)
    assert state.left_out == ("text_encoder",)
    assert len(state.tensors) == sum("alpha" not in key for key in unet)
    both = {**unet, **{k.replace("lora_unet_", "lora_te_"): t for k, t in unet.items()}}
    with pytest.raises(CheckpointError, match="both fit this model; say which"):
        load_state(both, case.base)
    chosen = load_state(lorafx.AdapterSource(both, component="text_encoder"), case.base)
    assert chosen.tensors.keys() == state.tensors.keys()


def test_diffusers_configuration_in_the_metadata(case: Case, tmp_path: Path) -> None:
    folder = case.folders["diffusers"]
    tensors = {f"unet.{m}.lora_{x}.weight": t for m, x, t in factors(folder)}
    own = {"unet.r": 4, "unet.lora_alpha": 9, "unet.peft_type": "LORA"}
    first = next(iter(factors(folder)))[2]
    own["unet.r"] = min(first.shape)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(own)})
    state = load_state(tmp_path, case.base)
    assert state.config == PeftConfig(r=own["unet.r"], lora_alpha=9)
    save_file(tensors, file)
    assert set(load_state(file, case.base).scales.values()) == {1.0}


def test_a_file_of_peft_without_its_configuration(case: Case) -> None:
    file = case.folders["peft"] / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match="without α"):
        load_state(load_file(file), case.base)
    # Beside its configuration the file is as good as the folder.
    assert load_state(file, case.base).config.lora_alpha == alpha(case.folders["peft"])


def test_loralib_merged_linear_is_refused() -> None:
    """Its factors of two slices would need a diagonal of their B."""
    tensors = {"0.lora_A": torch.randn(4, 5), "0.lora_B": torch.randn(8, 2)}
    with pytest.raises(UnsupportedAdapterError, match=r"MergedLinear saves .*\(N, 4\), and .* 2"):
        load_state(lorafx.AdapterSource(tensors, config={"lora_alpha": 3}))


def test_loralib_of_a_convolution_has_its_scale() -> None:
    tensors = {"0.lora_A": torch.randn(2, 5, 1, 1), "0.lora_B": torch.randn(8, 2, 1, 1)}
    source = lorafx.AdapterSource(tensors, config={"lora_alpha": 3})
    for model in (nn.Sequential(nn.Linear(5, 8)), nn.Sequential(nn.Conv2d(5, 8, 1))):
        _, sites = build_sites(model, LoraConfig(target_modules=["0"]))
        assert read_adapter(source, "a", sites, model=model).weights["0"].scale == 3 / 2


def test_loralib_takes_all_fields_of_its_configuration() -> None:
    model, tensors = nn.Sequential(nn.Linear(5, 8)), {"0.lora_A": torch.randn(4, 5)}
    tensors["0.lora_B"] = torch.randn(8, 4)
    _, sites = build_sites(model, LoraConfig(target_modules=["0"]))
    for more, scale in (({"use_rslora": True}, 3 / 2), ({"alpha_pattern": {"0": 12}}, 3)):
        source = lorafx.AdapterSource(tensors, config={"lora_alpha": 3, **more})
        assert read_adapter(source, "a", sites, model=model).weights["0"].scale == scale
    with pytest.raises(UnsupportedAdapterError, match="foo = 1: unknown field"):
        load_state(lorafx.AdapterSource(tensors, config={"lora_alpha": 3, "foo": 1}))


def test_mlx_dora(case: Case, tmp_path: Path) -> None:
    folder = save_adapter(
        case.base, tmp_path / "dora", rank=2, targets=["q_proj"], use_dora=True, lora_alpha=3
    )
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        name = {"A": "lora_a", "B": "lora_b"}.get(factor[0], "m")
        tensors[f"{path}.{name}"] = tensor if name == "m" else tensor.mT.contiguous()
    config = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 1.5}}
    lora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    check_equal(case.base, lora, lorafx.AdapterSource(tensors, config=config), folder)


def check_equal(model: nn.Module, config: LoraConfig, given: Any, expected: Any) -> None:
    _, sites = build_sites(model, config)
    got, want = (read_adapter(x, "a", sites, model=model).weights for x in (given, expected))
    assert got.keys() == want.keys() != set()
    for path, weights in want.items():
        for a, b in zip(got[path], weights, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_mlx_experts_are_those_of_their_names_one_by_one(tmp_path: Path) -> None:
    """switch_mlp holds the factors of all experts."""
    model = ExpertModel()
    model.block = nn.ModuleDict({"experts": model.block.experts})
    sizes = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}
    stacked, single = {}, {}
    torch.manual_seed(0)
    for name, (rows, columns) in sizes.items():
        a, b = torch.randn(3, 2, columns), torch.randn(3, rows, 2)
        path = f"block.switch_mlp.{name}.lora_"
        stacked |= {f"{path}a": a, f"{path}b": b}
        for e in range(3):
            single[f"block.experts.{e}.{name}.lora_A.weight"] = a[e]
            single[f"block.experts.{e}.{name}.lora_B.weight"] = b[e]
    mlx = lorafx.AdapterSource(stacked, config={"lora_parameters": {"rank": 2, "scale": 3.0}})
    peft = lorafx.AdapterSource(single, config={"r": 2, "lora_alpha": 6})
    check_equal(model, LoraConfig(target_modules=["experts"]), mlx, peft)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("base_model.model.a.oft_r.weight", "OFT"),
        ("lora_unet_a.w_norm", "norm of LyCORIS"),
        ("lora_unet_a.lora_t1", "Tucker"),
        ("bundle_emb.style.string_to_param.*", "textual inversion"),
        ("model.layers.0.mlp.experts.lora_gate_and_up_A", "grouped experts"),
    ],
)
def test_other_methods_are_refused_by_name(key: str, method: str, case: Case) -> None:
    with pytest.raises(UnsupportedAdapterError, match=method):
        load_state({key: torch.ones(2, 2)}, case.base)


@pytest.mark.parametrize(
    ("key", "method"),
    [("lora_unet_a.ia3_l", "IA³"), ("base_model.model.a.vera_lambda_b.default", "VeRA")],
)
def test_methods_that_need_a_configuration_ask_for_it(key: str, method: str, case: Case) -> None:
    with pytest.raises(CheckpointError, match=f"{method}, which is not known without a config"):
        load_state({key: torch.ones(2, 2)}, case.base)
