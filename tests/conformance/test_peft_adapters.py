"""Adapters that PEFT has trained and saved, of every feature of its LoRA, in mixed batches.

The models and configurations are the LoRA cases of `tests/test_custom_models.py` of PEFT 0.21,
rebuilt (two of them with a forward that keeps requests apart, which PEFT's do not), and those of a
mixture of experts. Each adapter is trained for a few steps of AdamW on random data and read from
disk; a model is compiled once with the adapters of all its cases. The oracle of a row is the model
that was trained, as it stands in memory, with that row alone.
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
from peft import KasaConfig, LoraConfig, MontecloraConfig, VeloraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.errors import UnsupportedAdapterError

STEPS = 3
#: Configurations that change the base weight first, which PEFT takes back when it saves.
CONVERTED = ("pissa", "olora")


class Steps(nn.Module):
    """Named modules one after the other, each behind a function of the tensor."""

    def __init__(self, **steps: nn.Module | tuple[Callable[[Tensor], Tensor], nn.Module]) -> None:
        super().__init__()
        self.before: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, step in steps.items():
            function, module = step if isinstance(step, tuple) else (torch.clone, step)
            self.before[name] = function
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name, function in self.before.items():
            x = getattr(self, name)(function(x))
            x = x[0] if isinstance(x, tuple) else x
        return x.log_softmax(-1)


def flat(x: Tensor) -> Tensor:
    return x.tanh().flatten(1)


class Multiply(nn.Module):
    """x W + b with W (K, N), of no class that anybody knows."""

    def __init__(self, in_features: int, out_features: int, name: str = "weight") -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(in_features, out_features)))
        self.bias = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self, self.name) + self.bias


class Attention(nn.Module):
    """Self-attention over the features' own dimension, requests first."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2, batch_first=True), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0]).log_softmax(-1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: Steps(lin0=nn.Linear(10, 20), lin1=(torch.tanh, nn.Linear(20, 2))),
    "EmbConv1D": lambda: Steps(
        emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5), lin0=(flat, nn.Linear(10, 2))
    ),
    "Conv1d": lambda: Steps(
        conv1d=(lambda x: x.unsqueeze(1), nn.Conv1d(1, 1, 2)), lin0=(flat, nn.Linear(9, 2))
    ),
    "Conv2d": lambda: Steps(conv2d=nn.Conv2d(5, 10, 3), lin0=(flat, nn.Linear(10, 2))),
    "Conv2dGroups": lambda: Steps(
        lin0=nn.Linear(45, 144),
        conv2d=(lambda x: x.view(-1, 16, 3, 3), nn.Conv2d(16, 16, 3, groups=8)),
        lin1=(flat, nn.Linear(16, 2)),
    ),
    "Conv3d": lambda: Steps(conv3d=nn.Conv3d(5, 10, 3), lin0=(flat, nn.Linear(10, 2))),
    "MHA": Attention,
    "MlpUsingParameters": lambda: Steps(
        lin0=Multiply(10, 20), lin1=(torch.tanh, Multiply(20, 2, "matrix"))
    ),
    "Experts": lambda: moe_base("qwen3_moe"),
}
#: Of one request.
SIZES: dict[str, tuple[int, ...]] = {
    "MLP": (10,),
    "EmbConv1D": (10,),
    "Conv1d": (10,),
    "Conv2d": (5, 3, 3),
    "Conv2dGroups": (45,),
    "Conv3d": (5, 3, 3, 3),
    "MHA": (3, 10),
    "MlpUsingParameters": (10,),
}
DORA: dict[str, Any] = {"use_dora": True}
BIAS: dict[str, Any] = {"lora_bias": True, "lora_alpha": 32}


PROJECTIONS = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "o_proj"]}
EXPERTS: dict[str, dict[str, Any]] = {
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
}


def targets(*names: str, **others: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **others}


SERVED: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 5", "MLP", targets("lin0", modules_to_save=["lin1"])),
    ("MLP 8 DoRA", "MLP", targets("lin0", "lin1", **DORA)),
    ("MLP MiCA", "MLP", targets("lin0", init_lora_weights="mica", r=4)),
    ("MLP 10 VeLoRA", "MLP", targets("lin0", velora_config=VeloraConfig(num_groups=2))),
    ("MLP KaSA", "MLP", targets("lin0", kasa_config=KasaConfig(), r=4)),
    ("MLP MonteCLoRA", "MLP", targets("lin0", monteclora_config=MontecloraConfig(num_samples=2))),
    ("MLP bias", "MLP", targets("lin0", "lin1", **BIAS)),
    ("MLP 2 nn.Parameter", "MLP", targets("lin0", target_parameters=["lin1.weight"])),
    ("Embedding + Conv1D", "EmbConv1D", targets("emb", "conv1d")),
    ("Embedding + Conv1D DoRA", "EmbConv1D", targets("emb", "conv1d", **DORA)),
    ("Conv1D and tokens", "EmbConv1D", targets("conv1d", trainable_token_indices={"emb": [0, 10]})),
    ("Conv1d", "Conv1d", targets("conv1d")),
    ("Conv1d DoRA", "Conv1d", targets("conv1d", **DORA)),
    ("Conv2d 2", "Conv2d", targets("conv2d", "lin0")),
    ("Conv2d 2 DoRA", "Conv2d", targets("conv2d", "lin0", **DORA)),
    ("Conv2d bias", "Conv2d", targets("conv2d", **BIAS)),
    ("Conv2d Groups", "Conv2dGroups", targets("conv2d")),
    ("Conv2d Groups DoRA", "Conv2dGroups", targets("conv2d", **DORA)),
    ("Conv3d 2", "Conv3d", targets("conv3d", "lin0")),
    ("Conv3d 2 DoRA", "Conv3d", targets("conv3d", "lin0", **DORA)),
    ("Conv3d bias", "Conv3d", targets("conv3d", **BIAS)),
    ("MHA 2", "MHA", targets("mha", "lin0")),
    (
        "MLP 1 nn.Parameter",
        "MlpUsingParameters",
        {"target_parameters": ["lin0.weight"], "target_modules": []},
    ),
    # not among PEFT's cases
    (
        "MLP 3 nn.Parameter",
        "MlpUsingParameters",
        {
            "target_parameters": ["lin0.weight", "lin1.matrix"],
            "target_modules": [],
            "rank_pattern": {"lin1.matrix": 2},
        },
    ),
    *((name, "Experts", {**PROJECTIONS, **config}) for name, config in EXPERTS.items()),
]
#: What changes the base weight, unless PEFT converts it, with the field that messages name.
REFUSED = [
    (how, targets("lin0", init_lora_weights=how), "init_lora_weights") for how in ("pissa", "olora")
]


def inputs_of(model: str, rows: int) -> dict[str, Tensor]:
    if model == "Experts":
        return {"input_ids": torch.randint(3, 40, (rows, 6))}
    if model == "EmbConv1D":
        return {"x": torch.randint(0, 12, (rows, 10))}
    return {"x": torch.randn(rows, *SIZES[model])}


def result(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output["logits"]


def base_of(model: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model]().eval().requires_grad_(False)


def train(base: nn.Module, model: str, config: dict[str, Any], folder: Path) -> nn.Module:
    """The model with an adapter that PEFT has trained and saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
        own, initial = wrapped.peft_config["default"], folder / "initial"
        converted = own.init_lora_weights in CONVERTED
        if converted:  # as PEFT's documentation has it
            how, own.init_lora_weights = own.init_lora_weights, True
            wrapped.save_pretrained(str(initial))
            own.init_lora_weights = how
        optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
        for _ in range(STEPS):
            optimiser.zero_grad()
            output = result(wrapped, inputs_of(model, 4))
            (output - torch.randn_like(output)).square().mean().backward()
            optimiser.step()
        source = {"path_initial_model_for_weight_conversion": str(initial)} if converted else {}
        wrapped.save_pretrained(str(folder), save_embedding_layers=False, **source)
    return wrapped.eval()


@dataclass
class Served:
    """A compiled model, and by adapter the model that it was trained in; None is the base."""

    cm: Any
    alone: dict[str | None, nn.Module]

    @torch.no_grad()
    def expected(self, names: list[str | None], inputs: dict[str, Tensor]) -> Tensor:
        rows = [oracle.one_row(inputs, row) for row in range(len(names))]
        return torch.cat([result(self.alone[n], row) for n, row in zip(names, rows, strict=True)])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    compiled: dict[str, Served] = {}

    def of(model: str) -> Served:
        if model not in compiled:
            base, folder = base_of(model), tmp_path_factory.mktemp(model)
            cases = {name: config for name, own, config in SERVED if own == model}
            folders = {name: folder / str(number) for number, name in enumerate(cases)}
            torch.manual_seed(1)
            alone: dict[str | None, nn.Module] = {None: base}
            for name, config in cases.items():
                alone[name] = train(base, model, config, folders[name])
            room = lorafx.LoraConfig(max_adapters=max(8, len(cases)), max_rank=8)
            options = {"lowering": "reference"}
            cm = lorafx.compile(
                copy.deepcopy(base),
                room,
                adapters=folders,
                options=options,
                dynamic=model != "Experts",
            )
            compiled[model] = Served(cm, alone)
        return compiled[model]

    return of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "model"), [case[:2] for case in SERVED], ids=lambda v: v)
def test_a_case_beside_others(name: str, model: str, served: Callable[[str], Served]) -> None:
    case = served(model)
    others = [other for other in case.alone if other not in (name, None)]
    names = [name, None, *others[:1], name, *others[-1:]]
    torch.manual_seed(2)
    inputs = inputs_of(model, len(names))
    want, first = case.expected(names, inputs), oracle.one_row(inputs, 0)
    assert oracle.difference([want[:1]], [case.expected([None], first)]) > 1e-4
    oracle.assert_close(result(case.cm, {**inputs, "adapter_names": names}), [want])
    oracle.assert_close(result(case.cm, {**first, "adapter_names": [name]}), [want[:1]])


@pytest.mark.parametrize(("config", "field"), [case[1:] for case in REFUSED])
def test_what_is_refused(config: dict[str, Any], field: str, tmp_path: Path) -> None:
    base = base_of("MLP")
    get_peft_model(copy.deepcopy(base), LoraConfig(**config)).save_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedAdapterError, match=field):
        lorafx.compile(base, {"a": tmp_path})
