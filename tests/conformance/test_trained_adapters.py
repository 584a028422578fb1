"""Every feature of PEFT's LoRA, in adapters that PEFT has trained and saved.

Two models carry them: a mixture of experts, and a model of the other kinds of modules. Each adapter
is trained for a few steps of AdamW on random data, saved by PEFT, and read from disk. The oracle of
a row is the model that was trained, as it stands in memory, with that row alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from expert_models import moe_base
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx

STEPS = 3
PROJECTIONS = ["q_proj", "v_proj", "o_proj"]
#: Configurations that change the base weight first, which PEFT takes back when it saves.
CONVERTED = ("pissa", "olora")


class Product(nn.Module):
    """x W with W (K, N), of no class that anybody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Kinds(nn.Module):
    """A convolution, attention, transformers' Conv1D and a matrix that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.wide = Conv1D(10, 6)  # its weight is (K, N): fan_in_fan_out
        self.product = Product()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mT.tanh().contiguous()
        x = x + self.attention(x, x, x)[0]
        return self.head(self.product(self.wide(x).tanh()))


def experts() -> nn.Module:
    return moe_base("qwen3_moe")


def kinds() -> nn.Module:
    torch.manual_seed(0)
    return Kinds().eval()


def tokens(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 40, (rows, 6))}


def signals(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 4, 7)}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output["logits"]


MODELS = {"experts": (experts, tokens), "kinds": (kinds, signals)}
DORA = {"use_dora": True}
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "experts": {
        "plain": {},
        "rslora": {"use_rslora": True, "lora_alpha": 4},
        "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
        "DoRA": DORA,
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "lora_bias": {"lora_bias": True},
        "lora_only": {"bias": "lora_only"},
        "head": {"modules_to_save": ["lm_head"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
        "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        "experts": {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
    },
    "kinds": {
        "convolution": {"target_modules": ["conv"]},
        "convolution with DoRA": {"target_modules": ["conv", "head"], **DORA},
        "attention": {"target_modules": ["attention"]},
        "fan_in_fan_out": {"target_modules": ["wide"]},
        "fan_in_fan_out with DoRA": {"target_modules": ["wide"], **DORA},
        "matrix": {"target_modules": [], "target_parameters": ["product.matrix"]},
    },
}
CASES = [(model, name) for model, adapters in ADAPTERS.items() for name in adapters]


@dataclass
class Trained:
    """A compiled model, the models that its adapters were trained in, and the base."""

    cm: Any
    alone: dict[str | None, nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]


def train(base: nn.Module, inputs: Any, config: dict[str, Any], folder: Path) -> nn.Module:
    """The model with an adapter that PEFT has trained and saved."""
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": PROJECTIONS, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
        own, initial = model.peft_config["default"], folder / "initial"
        converted = own.init_lora_weights in CONVERTED
        if converted:  # as PEFT's documentation has it
            how, own.init_lora_weights = own.init_lora_weights, True
            model.save_pretrained(str(initial))
            own.init_lora_weights = how
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(STEPS):
            optimiser.zero_grad()
            result = logits(model, inputs(4))
            (result - torch.randn_like(result)).square().mean().backward()
            optimiser.step()
        source = {"path_initial_model_for_weight_conversion": str(initial)} if converted else {}
        model.save_pretrained(str(folder), save_embedding_layers=False, **source)
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def of(model: str) -> Trained:
        if model not in made:
            build, inputs = MODELS[model]
            base, folder = build(), tmp_path_factory.mktemp(model)
            adapters = ADAPTERS[model]
            folders = {name: folder / name for name in adapters}
            torch.manual_seed(1)
            alone: dict[str | None, nn.Module] = {
                name: train(base, inputs, config, folders[name])
                for name, config in adapters.items()
            }
            room = lorafx.LoraConfig(max_adapters=len(adapters), max_rank=8)
            options = {"lowering": "reference"}
            cm = lorafx.compile(
                copy.deepcopy(base), room, adapters=folders, options=options, dynamic=False
            )
            made[model] = Trained(cm, {None: base, **alone}, inputs)
        return made[model]

    return of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "name"), CASES)
def test_an_adapter_that_was_trained(
    model: str, name: str, trained: Callable[[str], Trained]
) -> None:
    case = trained(model)
    others = [other for other in ADAPTERS[model] if other != name]
    names = [name, None, others[0], name, others[-1]]
    torch.manual_seed(2)
    inputs = case.inputs(len(names))
    with torch.no_grad():
        rows = [oracle.one_row(inputs, row) for row in range(len(names))]
        want = torch.cat([logits(case.alone[n], own) for n, own in zip(names, rows, strict=True)])
        base = logits(case.alone[None], rows[0])
    assert oracle.difference([want[:1]], [base]) > 1e-3  # training has changed it
    oracle.assert_close(logits(case.cm, {**inputs, "adapter_names": names}), [want])
    oracle.assert_close(logits(case.cm, {**rows[0], "adapter_names": [name]}), [want[:1]])
