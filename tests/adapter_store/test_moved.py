"""Adapters under other names: of a text model on one that holds it, and of wrapped models."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, random_base, save_adapter
from dialect_files import factors
from llava import llava
from safetensors.torch import load_file, save_file
from tiny_models import token_inputs
from torch import nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore"),
]
MAPPING = {r"^model\.layers": "model.language_model.layers"}


@pytest.fixture(scope="module")
def text() -> nn.Module:
    return random_base("llama")


@pytest.fixture(scope="module")
def folder(text: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("text")
    config = {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}, "lora_alpha": 5}
    return save_adapter(text, home, rank=2, targets=["q_proj", "v_proj", "lm_head"], **config)


@pytest.fixture(scope="module")
def case(text: nn.Module, folder: Path) -> Case:
    base = llava(text, 20)
    merged = copy.deepcopy(base)
    held: dict[str, dict[str, torch.Tensor]] = {}
    for module, letter, tensor in factors(folder):
        held.setdefault(module, {})[letter] = tensor
    for module, pair in held.items():
        path = module.replace("model.layers", "model.language_model.layers")
        merged.get_submodule(path).weight += 5 / len(pair["A"]) * pair["B"] @ pair["A"]
    return Case(base, {"a": folder, "b": folder}, {"a": merged, "b": merged})


@pytest.mark.usefixtures("in_eager_mode")
def test_found_by_itself_and_by_key_mapping_in_one_batch(case: Case, caplog) -> None:
    mapped = lorafx.AdapterSource(case.folders["b"], key_mapping=MAPPING)
    with caplog.at_level(logging.INFO, logger="lorafx"):
        cm = lorafx.compile(case.model(), {"a": case.folders["a"], "b": mapped}, options=REFERENCE)
    check_mixed(cm, case, ["a", None, "b"], {"input_ids": token_inputs(3, 6)["input_ids"]})
    said = "model is model.language_model here"
    assert sum(said in record.getMessage() for record in caplog.records) == 1


def test_several_places_are_an_error_that_names_them(text, tmp_path: Path) -> None:
    model = llava(text, 24)  # the vision tower's layers have the same names and sizes
    folder = save_adapter(text, tmp_path, rank=2, targets=["q_proj"])
    with pytest.raises(
        CheckpointError, match=r"language_model or model.vision_tower|vision_tower\S* or model.lang"
    ):
        load_state(folder, model)
    state = load_state(lorafx.AdapterSource(folder, key_mapping=MAPPING), model)
    assert all("language_model.layers" in key for key in state.tensors)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ([("^model", "a")], ConfigError, r"maps regular expressions .* got \[\('\^model'"),
        ({"(": "a"}, ConfigError, r"'\(' is no regular expression"),
        ({"^nothing": "a"}, ConfigError, "matches no path"),
        ({"^model": r"\9"}, ConfigError, "cannot become"),
        ({r"[qv]_proj": "q_proj"}, CheckpointError, "both become"),
    ],
)
def test_mappings_that_are_wrong(mapping, error, message, case: Case, folder: Path) -> None:
    with pytest.raises(error, match=message):
        load_state(lorafx.AdapterSource(folder, key_mapping=mapping), case.base)


def test_patterns_name_parameters_by_their_saved_paths() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    model, x = nn.Sequential(Router()), torch.randn(2, 6)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    want = x @ (model[0].weight + 16 * b @ a).T
    pattern = {r"^old\.router\.weight": 32}
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["weight"], "alpha_pattern": pattern}
    tensors = {"old.router.lora_A.weight": a, "old.router.lora_B.weight": b}
    source = lorafx.AdapterSource(tensors, config=config, key_mapping={r"^old\.router": "0"})
    cm = lorafx.compile(model, {"a": source}, options=REFERENCE)
    torch.testing.assert_close(cm(x, adapter_names=["a", "a"]), want)


PREFIX = "base_model.model."
#: What each wrapper makes of `base_model.model.<path>.lora_A.weight`.
NAMINGS: dict[str, Callable[[str], str]] = {
    "DDP outside": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "FSDP": lambda key: re.sub(r"layers\.(\d+)", r"layers.\1._fsdp_wrapped_module", key),
    "checkpointing": lambda key: key.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "without the head": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
}


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the factors in `folder` other keys."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = {rename(key): tensor for key, tensor in tensors.items()}
    assert changed.keys().isdisjoint(tensors)
    save_file(changed, file)


def test_a_mixed_batch_of_every_naming(in_eager_mode: None, tmp_path: Path) -> None:
    base = random_base("llama")
    folders = {
        name: save_adapter(base, tmp_path / name, rank=2, targets=["down_proj"], seed=seed)
        for seed, name in enumerate(NAMINGS)
    }
    case = Case(base, folders)
    for name in NAMINGS:
        case.alone(name)  # the oracle reads the names that PEFT gave
        renamed(folders[name], NAMINGS[name])
    cm = lorafx.compile(case.model(), folders, options={"lowering": "reference"})
    assert all(site.path.endswith("down_proj") for site in cm.sites)
    names = [*NAMINGS, None]
    check_mixed(cm, case, names, token_inputs(len(names), 6))


def test_a_layer_that_the_model_lacks_is_not_another_one(tmp_path: Path) -> None:
    """Of the same names and sizes, and the only one there is."""
    model = random_base("llama")
    folder = save_adapter(model, tmp_path, rank=2, targets=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("layers.0", "layers.7"): t for key, t in tensors.items()}, file)
    with pytest.raises(lorafx.LorafxError, match=r"layers\.7"):
        lorafx.compile(model, {"a": folder}, options=REFERENCE)
