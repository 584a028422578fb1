"""Builders that the adapter tests share: tiny models, their sites, adapters that PEFT saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorafx.model.sites import Site
from lorafx.registry import lookup


class Plain(nn.Module):
    """Two linears of unequal sizes and an embedding, called in no particular way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


def _llama(tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tied=True),
    "gpt2": _gpt2,
    "plain": Plain,
}


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """Model by name, with the same random weights every time."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(7)
        return _MODELS[name]().eval()

    return make


@pytest.fixture
def sites_of() -> Callable[..., list[Site]]:
    """The sites of a model whose path ends in one of `names` (all eligible ones by default)."""

    def make(model: nn.Module, names: Sequence[str] = ("",)) -> list[Site]:
        sites = []
        for path, module in model.named_modules():
            entry = lookup(module)
            if entry is not None and path.endswith(tuple(names)):
                weight = getattr(module, entry.weight)
                sizes = entry.sizes(module)
                sites.append(Site(path, (), module, entry, *sizes, weight.dtype, weight.device))
        return sites

    return make


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Wrap a model with PEFT, randomise the adapter, save it; returns the folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(model: nn.Module, folder: str = "adapter", dtype=None, **config) -> Path:
        torch.manual_seed(len(folder))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
                    if dtype is not None:
                        parameter.data = parameter.data.to(dtype)
        wrapped.save_pretrained(str(tmp_path / folder))
        return tmp_path / folder

    return make
