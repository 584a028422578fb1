"""`lorafx.explain` of a model that is not compiled: what it predicts is what compiling makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from dense_merge import REFERENCE, Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from lorafx.inspection.explanation import Explanation

pytestmark = pytest.mark.quick

CONFIG = lorafx.LoraConfig("all-linear", max_adapters=3, max_rank=4)


@pytest.mark.parametrize("family", ["vit", "plain"])
def test_sites_and_bytes_are_those_of_the_compiled_model(
    case_of: Callable[..., Case], family: str
) -> None:
    model = case_of(family).model()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    told = lorafx.explain(model, CONFIG)
    assert {n: id(tensor) for n, tensor in model.state_dict(keep_vars=True).items()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    cm = lorafx.compile(model, CONFIG, options=REFERENCE)
    made = cm.explain()
    assert (told.sites, told.banks, told.passes) == (made.sites, made.banks, made.passes)
    assert (told.weight_bytes, told.adapter_bytes) == (made.weight_bytes, made.adapter_bytes)
    assert sum(bank.nbytes for bank in told.banks) == cm.memory()["banks"]
    assert told.weight_bytes == cm.memory()["base"]
    sizes = sum(site.in_features + site.out_features for site in cm.sites)
    assert told.adapter_bytes == 4 * CONFIG.max_rank * sizes


class _NoStorage(TorchDispatchMode):
    """Counts bytes of tensors that operators make anywhere but on the meta device."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.bytes += sum(value.nbytes for value in own if not value.is_meta)
        return result


LARGE = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def large() -> tuple[nn.Module, Explanation, int]:
    """A Llama of 70B on the meta device, its report, and the bytes that this took."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LARGE).eval()
    config = lorafx.LoraConfig("all-linear", max_adapters=32)
    with _NoStorage() as counted:
        told = lorafx.explain(model, config)
    return model, told, counted.bytes


def test_a_large_model_takes_no_memory(large: tuple[nn.Module, Explanation, int]) -> None:
    model, told, counted = large
    assert counted < 1e6
    assert told.weight_bytes == 2 * sum(p.numel() for p in model.parameters()) > 140e9
    assert len(told.sites) == 7 * 80


def test_the_report_as_text_json_and_html(large: tuple[nn.Module, Explanation, int]) -> None:
    told = large[1]
    lines = [line.strip() for line in str(told).splitlines()]
    assert len(lines) < 60
    assert "sites: 560" in lines
    for line in (
        "model.layers.{0-79}.self_attn.q_proj: Linear, 8192 -> 8192, bfloat16",
        "model.layers.{0-79}.self_attn: [q_proj, k_proj, v_proj, o_proj], 52.4 MB",
    ):
        assert line in lines
    assert any(line.startswith("lm_head: not selected: all linear layers but") for line in lines)
    read = json.loads(json.dumps(told.json()))
    assert len(read["sites"]) == 560
    assert read["banks"][0]["names"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "lm_head" in told._repr_html_()


def test_a_model_whose_weights_accelerate_left_out(llama: Case) -> None:
    with init_empty_weights():
        empty = LlamaForCausalLM(llama.base.config).eval()
    told, full = (lorafx.explain(model, CONFIG).json() for model in (empty, llama.base))
    for report in (told, full):
        for item in report["prepared"]:
            del item["seconds"]
    assert told == full


class Odd(nn.Module):
    """A module under two names, a tied weight, a matrix of a class of its own, a size of none."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 8))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.router = self.Router()
        self.void = nn.Linear(8, 0)
        self.head = nn.Sequential(nn.Linear(8, 16, bias=False))
        self.head[0].weight = self.embed.weight


def test_what_carries_no_lora_and_what_is_shared() -> None:
    with pytest.warns(
        lorafx.LorafxWarning, match=r"void \(Linear\) is left out: its weight is empty"
    ):
        told = str(lorafx.explain(Odd().eval(), lorafx.LoraConfig(max_adapters=32)))
    assert "embed: not selected: all linear layers are selected, and a Embedding is" in told
    assert "void: not selected: its weight is empty" in told
    assert "first is also again: one module, with one delta" in told
    assert "embed.weight, head.0.weight are one weight" in told
