"""`lorafx.explain` of a model that is not compiled: what it predicts is what compiling makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from dense_merge import REFERENCE, Case
from tiny_models import FAMILIES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from lorafx.inspection.prediction import Prediction
from lorafx.inspection.report import over

pytestmark = pytest.mark.quick

CONFIG = lorafx.LoraConfig("all-linear", max_adapters=3, max_rank=4)


def nodes_of(prediction: Prediction) -> set[frozenset[str]]:
    """The paths of the sites of each predicted node."""
    return {
        frozenset(f"{parent}.{name}".lstrip(".") for name in pack.members)
        for pack in prediction.packs
        for parent in pack.paths
    }


def compiled_nodes(cm: Any) -> set[frozenset[str]]:
    found: dict[tuple[int, int], set[str]] = {}
    for at, record in enumerate(cm._session.backend.records):
        for state in record.states:
            found.setdefault((at, state.node_key), set()).add(state.site.path)
    return {frozenset(paths) for paths in found.values()}


@pytest.mark.parametrize("family", ["vit", "plain"])
def test_packs_and_bytes_are_those_of_the_compiled_model(
    case_of: Callable[..., Case], family: str
) -> None:
    case = case_of(family)
    inputs = FAMILIES[family].inputs(3, 5)
    given = {"example_inputs": inputs}
    model = case.model()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    told = lorafx.explain(model, CONFIG, **given)
    assert isinstance(told, Prediction)
    assert {n: id(tensor) for n, tensor in model.state_dict(keep_vars=True).items()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    cm = lorafx.compile(model, CONFIG, options=REFERENCE, dynamic=False)
    cm.load_adapter(case.folders["a0"], "a0", strict=False)
    cm(**inputs, adapter_names=["a0", None, "a0"])
    assert nodes_of(told) == compiled_nodes(cm)
    assert any(len(pack.members) > 1 for pack in told.packs)
    banks = sum(group.bank.nbytes for group in cm._session.program.groups)
    assert told.totals.bank_bytes == banks
    weights = sum(site.module.weight.nbytes for site in cm.sites)
    assert told.totals.weight_bytes == weights
    assert sum(len(row.paths) * row.weight_bytes for row in told.sites) == weights
    assert told.totals.sites == sum(len(row.paths) for row in told.sites) == len(cm.sites)


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
def large() -> tuple[nn.Module, Prediction, int]:
    """A Llama of 70B on the meta device, its prediction, and the bytes that it took."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LARGE).eval()
    config = lorafx.LoraConfig("all-linear", max_adapters=32)
    with _NoStorage() as counted:
        told = lorafx.explain(model, config)
    return model, told, counted.bytes


def test_a_large_model_takes_no_memory(large: tuple[nn.Module, Prediction, int]) -> None:
    model, told, counted = large
    assert counted < 1e6
    assert told.totals.model_bytes == 2 * sum(p.numel() for p in model.parameters()) > 140e9
    assert told.totals.sites == 7 * 80
    assert [(pack.pattern, len(pack.paths)) for pack in told.packs] == [
        ("model.layers.{0-79}.self_attn: q_proj + k_proj + v_proj", 80),
        ("model.layers.{0-79}.self_attn: o_proj", 80),
        ("model.layers.{0-79}.mlp: gate_proj + up_proj", 80),
        ("model.layers.{0-79}.mlp: down_proj", 80),
    ]


def test_the_report_as_text_json_and_html(large: tuple[nn.Module, Prediction, int]) -> None:
    told = large[1]
    text = str(told)
    assert "sites: 560" in text
    assert "not selected: lm_head (Linear)" in text
    [line] = [line for line in text.splitlines() if "mlp: down_proj" in line]
    assert f"{over(told.packs[-1].floors[2][1])}" in line
    read = json.loads(json.dumps(told.json()))
    assert read["totals"]["sites"] == 560
    assert read["sites"][0]["pattern"] == "model.layers.{0-79}.self_attn.q_proj"
    assert read["packs"][0]["members"] == ["q_proj", "k_proj", "v_proj"]
    assert told._repr_html_().count("<tr>") > len(told.sites) + len(told.packs)


def test_a_model_whose_weights_accelerate_left_out(llama: Case) -> None:
    with init_empty_weights():
        empty = LlamaForCausalLM(llama.base.config).eval()
    told, full = lorafx.explain(empty, CONFIG), lorafx.explain(llama.base, CONFIG)
    assert told.json() == full.json()


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
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 16, bias=False))
        self.head[0].weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.embed(ids))
        if float(x.sum()) > 0:
            x = self.left(x)
        return self.head(self.right(x))


def test_what_carries_no_lora_and_what_is_shared() -> None:
    model = Odd().train()
    told = lorafx.explain(model, lorafx.LoraConfig(max_adapters=32))
    notes = [(note.kind, note.text) for note in told.notes]
    kinds = [kind for kind, _ in notes]
    assert ("not selected", "embed (Embedding)") in notes
    assert any("router (Router), a matrix of a class" in text for _, text in notes)
    assert ("alias", "first is also again: one module, with one delta") in notes
    assert ("tied", "head.0.weight is also embed.weight, where no delta is added") in notes
    assert "training" in kinds
    assert "capacity" not in kinds
    [refused] = [text for kind, text in notes if kind == "refused"]
    assert "void" in refused
    assert "its weight is empty" in refused
