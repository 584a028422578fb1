"""Checkpoints that cannot be read: each problem named, all of a file at once."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorafx.adapter_store.peft_reader import adapter_target_modules, read_adapter
from lorafx.errors import CapacityError, CheckpointError, LorafxWarning, UnsupportedAdapterError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.quick]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
QKV = ["q_proj", "k_proj", "v_proj"]


def rewrite(folder, change) -> None:
    """Apply `change` to the saved tensors, in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)


def configure(folder, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def _set(key, value):
    return lambda tensors: tensors.update({key: value})


UP = "base_model.model.up.lora_"

BROKEN = {
    "wrong K": (
        _set(f"{UP}A.weight", torch.ones(2, 5)),
        r"up\.lora_A\.weight has shape \(2, 5\), up needs \(r, 6\)",
    ),
    "wrong N": (
        _set(f"{UP}B.weight", torch.ones(9, 2)),
        r"has shape \(9, 2\), up needs \(10, r = 2\)",
    ),
    "wrong r": (
        _set(f"{UP}B.weight", torch.ones(10, 3)),
        r"has shape \(10, 3\), up needs \(10, r = 2\)",
    ),
    "flat": (_set(f"{UP}A.weight", torch.ones(12)), "without gathering its shards"),
    "empty": (_set(f"{UP}A.weight", torch.ones(0, 6)), "without gathering its shards"),
    "A alone": (lambda t: t.pop(f"{UP}B.weight"), "up has no factor B"),
    "B alone": (lambda t: t.pop(f"{UP}A.weight"), "up has no factor A"),
    "NaN": (
        _set(f"{UP}A.weight", torch.full((2, 6), torch.nan)),
        "holds 12 NaN or infinite values",
    ),
    "Inf": (
        _set(f"{UP}B.weight", torch.full((10, 2), torch.inf)),
        "holds 20 NaN or infinite values",
    ),
    "integers": (
        _set(f"{UP}A.weight", torch.ones(2, 6, dtype=torch.int32)),
        "must be floating point",
    ),
    "differing twin": (
        _set("up.lora_A.weight", torch.ones(2, 6)),
        "are both lora_A of up and differ",
    ),
    "wrong kind": (
        _set("base_model.model.up.lora_embedding_A", torch.ones(2, 6)),
        "which is a linear layer here",
    ),
    "leftover": (
        _set("base_model.model.up.thing", torch.ones(2)),
        r"up\.thing is not a LoRA factor",
    ),
    "unknown module": (
        lambda t: t.update({"base_model.model.upp.lora_A.weight": torch.ones(2, 6)}),
        "base_model.model.upp: no such module in this model; nearest: up",
    ),
    "changed base weight": (
        _set("base_model.model.embed.base_layer.weight", torch.ones(11, 6)),
        r"embed\.base_layer\.weight \(11, 6\) is a base weight that differs",
    ),
    "resized embedding": (
        _set("base_model.model.embed.weight", torch.ones(12, 6)),
        r"\(12, 6\) is a base weight that differs from the model's \(11, 6\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case, build, sites_of, save):
    change, message = BROKEN[case]
    folder = save(build("plain"), r=2, target_modules=["up", "down", "embed"])
    model = build("plain")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(folder, "mine", sites_of(model), model=model)
    assert "adapter 'mine' in " in str(caught.value)


def test_all_problems_at_once(build, sites_of, save):
    folder = save(build("plain"), r=2, target_modules=["up", "down"])
    model = build("plain")

    def change(tensors):
        tensors["base_model.model.up.lora_A.weight"] = torch.ones(2, 5)
        tensors["base_model.model.down.lora_B.weight"] = torch.full((6, 2), torch.nan)
        tensors["base_model.model.extra"] = torch.ones(1)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder, "a", sites_of(model), model=model, max_rank=1)
    for part in ("up.lora_A", "down.lora_B", "base_model.model.extra"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "feature"),
    [
        ("base_model.model.up.lora_magnitude_vector", "use_dora"),
        ("base_model.model.up.lora_B.bias", "lora_bias"),
        ("base_model.model.up.modules_to_save.weight", "modules_to_save"),
    ],
)
def test_keys_of_other_features(key, feature, build, sites_of, save):
    folder = save(build("plain"), r=2, target_modules=["up"])
    rewrite(folder, _set(key, torch.ones(10)))
    with pytest.raises(UnsupportedAdapterError, match=feature):
        read_adapter(folder, "a", sites_of(model := build("plain")), model=model)


def test_trained_tokens_that_nothing_names(build, sites_of, save):
    key = "base_model.model.embed.token_adapter.trainable_tokens_delta"
    folder = save(build("plain"), r=2, target_modules=["up"])
    rewrite(folder, _set(key, torch.ones(2, 12)))
    with pytest.raises(CheckpointError, match="trainable_token_indices does not say of embed"):
        read_adapter(folder, "a", sites_of(model := build("plain")), model=model)


@pytest.mark.parametrize("compiled", [False, True])
def test_unselected_module(compiled, build, sites_of, save):
    folder = save(build("plain"), r=2, target_modules=["up", "down"])
    model = torch.compile(build("plain")) if compiled else build("plain")
    with pytest.raises(CheckpointError, match="down exists but was not selected") as caught:
        read_adapter(folder, "a", sites_of(model, ["up"]), model=model)
    assert len(str(caught.value).splitlines()) == 2  # and is not reported a second time


def test_a_targeted_module_that_the_file_lacks(build, sites_of, save):
    folder = save(build("plain"), r=2, target_modules=["up", "down"])
    model = build("plain")
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "down" in k])
    message = r"no factors for 1 of them \(50 %\): down"
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, "a", sites_of(model), model=model, strict=True)
    with pytest.warns(LorafxWarning, match=message):
        assert list(read_adapter(folder, "a", sites_of(model), model=model).weights) == ["up"]
    with warnings.catch_warnings():  # down is no site: nobody asked for it
        warnings.simplefilter("error", LorafxWarning)
        read_adapter(folder, "a", sites_of(model, ["up"]), model=model, strict=True)


def test_rank_that_the_configuration_contradicts(build, sites_of, save):
    folder = save(build("plain"), r=2, target_modules=["up"])
    configure(folder, r=4)
    with pytest.raises(CheckpointError, match=r"up has rank 2, adapter_config\.json says 4"):
        read_adapter(folder, "a", sites_of(model := build("plain")), model=model)


def test_rank_over_the_banks(build, sites_of, save):
    folder = save(build("plain"), r=3, target_modules=["up"])
    with pytest.raises(CapacityError, match=r"rank 3 is over max_rank = 2 \(up\).*max_rank=3"):
        read_adapter(folder, "a", sites_of(model := build("plain")), model=model, max_rank=2)


def test_another_models_checkpoint(build, sites_of, save):
    folder = save(build("llama"), r=2, target_modules=QKV)
    configure(folder, base_model_name_or_path="some/llama")
    model = build("gpt2")
    with pytest.raises(CheckpointError, match=r"6 of the 6 modules .*another model .'some/llama'"):
        read_adapter(folder, "a", sites_of(model), model=model)


def test_saved_copies_of_base_weights_are_compared(build, sites_of, save):
    """PEFT saves the embedding's base weight beside its factors; equal ones are no problem."""
    folder = save(build("llama"), r=2, target_modules=["embed_tokens", "lm_head"])
    assert any(k.endswith("embed_tokens.base_layer.weight") for k in load_file(folder / WEIGHTS))
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama").to(dtype)
        assert len(read_adapter(folder, "a", sites_of(model), model=model).weights) == 2
    other = build("llama")
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(CheckpointError, match="base weight that differs"):
        read_adapter(folder, "a", sites_of(other), model=other)


def _truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


FILES = {
    "truncated": (_truncate, "not a readable safetensors file"),
    "absent": (lambda f: (f / WEIGHTS).unlink(), "holds no adapter weights"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json"),
    "no factors": (lambda f: save_file({}, f / WEIGHTS), "holds no LoRA factors"),
}


@pytest.mark.parametrize("case", FILES)
def test_unreadable_folder(case, build, sites_of, save):
    damage, message = FILES[case]
    folder = save(build("plain"), r=2, target_modules=["up"])
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, "a", sites_of(model := build("plain")), model=model)
    with pytest.raises(CheckpointError, match=message):
        adapter_target_modules(folder, model)


def test_names_the_folder_below(build, save):
    folder = save(build("plain"), folder="parent/sql", r=2, target_modules=["up"])
    with pytest.raises(CheckpointError, match="its subfolders with adapters are sql"):
        read_adapter(folder.parent, "a", [], model=nn.Module())
