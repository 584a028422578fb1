"""Checkpoints that cannot be read: each problem named, all of a file at once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import adapter_target_modules, read_adapter
from lorafx.adapter_store.saved import AdapterState
from lorafx.adapter_store.stored import Adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning
from lorafx.prepare.marking import build_sites

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.quick]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base_model.model."
UP = f"{BASE}up.lora_"
PAIRS = {
    f"{UP}A.weight": torch.ones(2, 6),
    f"{UP}B.weight": torch.ones(10, 2),
    f"{BASE}down.lora_A.weight": torch.ones(2, 10),
    f"{BASE}down.lora_B.weight": torch.ones(6, 2),
    f"{BASE}embed.lora_embedding_A": torch.ones(2, 11),
    f"{BASE}embed.lora_embedding_B": torch.ones(6, 2),
}


def plain() -> nn.Module:
    torch.manual_seed(7)
    linears = {"up": nn.Linear(6, 10), "down": nn.Linear(10, 6, bias=False)}
    return nn.ModuleDict({"embed": nn.Embedding(11, 6), **linears})


def read(
    change: dict[str, Tensor | None],
    config: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    targets: Any = ("up", "down", "embed"),
    **kwargs: Any,
) -> Adapter:
    """The adapter with some tensors changed, or taken out, on a plain model."""
    changed = {**PAIRS, **change}
    tensors = {key: tensor for key, tensor in changed.items() if tensor is not None}
    fields = {"r": 2, "target_modules": ["up", "down", "embed"], **(config or {})}
    state = AdapterState(PeftConfig.read(fields), tensors, "memory")
    model = plain() if model is None else model
    inner = getattr(model, "_orig_mod", model)
    _, sites = build_sites(inner, LoraConfig(target_modules=[*targets]))
    return read_adapter(state, "mine", sites, model=model, **kwargs)


BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "wrong K": (
        {f"{UP}A.weight": torch.ones(2, 5)},
        r"up\.lora_A\.weight has shape \(2, 5\), up needs \(r, 6\)",
    ),
    "wrong r": ({f"{UP}B.weight": torch.ones(10, 3)}, r"\(10, 3\), up needs \(10, r = 2\)"),
    "empty": ({f"{UP}A.weight": torch.ones(0, 6)}, "without gathering its shards"),
    "A alone": ({f"{UP}B.weight": None}, "up has no factor B"),
    "NaN": ({f"{UP}A.weight": torch.full((2, 6), torch.nan)}, "holds 12 NaN or infinite values"),
    "differing twin": ({"up.lora_A.weight": torch.zeros(2, 6)}, "both lora_A of up and differ"),
    "leftover": ({f"{BASE}up.thing": torch.ones(2)}, r"up\.thing is not a LoRA factor"),
    "unknown module": (
        {f"{BASE}upp.lora_A.weight": torch.ones(2, 6)},
        "base_model.model.upp: no such module in this model; nearest: up",
    ),
    "changed base weight": (
        {f"{BASE}embed.base_layer.weight": torch.ones(11, 6)},
        r"embed\.base_layer\.weight \(11, 6\) is a base weight that differs",
    ),
    "tokens that nothing names": (
        {f"{BASE}embed.token_adapter.trainable_tokens_delta": torch.ones(2, 12)},
        "trainable_token_indices does not say of embed",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(change)
    assert "adapter 'mine' in " in str(caught.value)


@pytest.mark.parametrize("compiled", [False, True])
def test_unselected_module(compiled: bool) -> None:
    model: Any = torch.compile(plain()) if compiled else plain()
    with pytest.raises(CheckpointError, match="down exists but was not selected") as caught:
        read({}, model=model, targets=("up", "embed"))
    assert len(str(caught.value).splitlines()) == 2  # and is not reported a second time


def test_a_targeted_module_that_the_file_lacks() -> None:
    change: dict[str, Tensor | None] = {key: None for key in PAIRS if "down" in key}
    message = r"no factors for 1 of them \(33 %\): down"
    with pytest.raises(CheckpointError, match=message):
        read(change, strict=True)
    with pytest.warns(LorafxWarning, match=message):
        assert {*read(change).weights} == {"up", "embed"}
    with warnings.catch_warnings():  # down is no site: nobody asked for it
        warnings.simplefilter("error", LorafxWarning)
        read(change, targets=("up", "embed"), strict=True)


def test_saved_copies_of_base_weights_are_compared(build, sites_of, save) -> None:
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


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


FILES = {
    "truncated": (_truncate, "not a readable safetensors file"),
    "absent": (lambda f: (f / WEIGHTS).unlink(), "holds no adapter weights"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json"),
    "no factors": (lambda f: save_file({}, f / WEIGHTS), "holds no LoRA factors"),
}


@pytest.mark.parametrize("case", FILES)
def test_unreadable_folder(case: str, tmp_path: Path) -> None:
    damage, message = FILES[case]
    folder = tmp_path / "sql"
    folder.mkdir()
    save_file(PAIRS, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    damage(folder)
    model = plain()
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, "a", build_sites(model, LoraConfig())[1], model=model)
    with pytest.raises(CheckpointError, match=message):
        adapter_target_modules(folder, model)
    if (folder / CONFIG).exists():
        with pytest.raises(CheckpointError, match="its subfolders with adapters are sql"):
            read_adapter(tmp_path, "a", [], model=model)
