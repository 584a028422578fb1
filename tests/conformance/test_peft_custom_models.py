"""The LoRA cases of PEFT's own tests of custom models, in mixed batches.

The models and configurations are those of `tests/test_custom_models.py` of PEFT 0.21, rebuilt; two
of them with a forward that keeps requests apart, which PEFT's do not (`Conv2dGroups` flattens the
batch, `Conv2dGroups2` ignores its input). A model is compiled once with the adapters of all its
cases, so that adapters of different kinds are in one batch. The oracle is PEFT's output of each row
alone, with the adapter read from disk.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import (
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.errors import UnsupportedAdapterError


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
    "Conv2dGroups2": lambda: Steps(
        conv2d=nn.Conv2d(16, 32, 3, padding=1, groups=2), lin0=(flat, nn.Linear(800, 2))
    ),
    "Conv3d": lambda: Steps(conv3d=nn.Conv3d(5, 10, 3), lin0=(flat, nn.Linear(10, 2))),
    "MHA": Attention,
    "MlpUsingParameters": lambda: Steps(
        lin0=Multiply(10, 20), lin1=(torch.tanh, Multiply(20, 2, "matrix"))
    ),
}
#: Of one request.
SIZES: dict[str, tuple[int, ...]] = {
    "MLP": (10,),
    "EmbConv1D": (10,),
    "Conv1d": (10,),
    "Conv2d": (5, 3, 3),
    "Conv2dGroups": (45,),
    "Conv2dGroups2": (16, 5, 5),
    "Conv3d": (5, 3, 3, 3),
    "MHA": (3, 10),
    "MlpUsingParameters": (10,),
}
VELORA = [
    VeloraConfig(num_groups=2, init_type=how)
    for how in ("random", "batch_average", "batch_average_once")
]
DORA: dict[str, Any] = {"use_dora": True}
BIAS: dict[str, Any] = {"lora_bias": True, "lora_alpha": 32}


def targets(*names: str, **others: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **others}


SERVED: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", targets("lin0")),
    ("MLP 3", "MLP", targets("lin1")),
    ("MLP 4", "MLP", targets("lin0", "lin1")),
    ("MLP 5", "MLP", targets("lin0", modules_to_save=["lin1"])),
    ("MLP 6", "MLP", targets("lin0", lora_alpha=4, lora_dropout=0.1)),
    ("MLP 7 DoRA", "MLP", targets("lin0", **DORA)),
    ("MLP 8 DoRA", "MLP", targets("lin0", "lin1", **DORA)),
    ("MLP 9 DoRA", "MLP", {"target_modules": "lin1", "lora_alpha": 32, **DORA}),
    ("MLP MiCA", "MLP", targets("lin0", init_lora_weights="mica", r=4)),
    ("MLP 10 VeLoRA", "MLP", targets("lin0", velora_config=VELORA[0])),
    ("MLP 11 VeLoRA", "MLP", targets("lin0", "lin1", velora_config=VELORA[1])),
    ("MLP 12 VeLoRA", "MLP", targets("lin0", velora_config=VELORA[2])),
    ("MLP bias", "MLP", targets("lin0", "lin1", **BIAS)),
    ("MLP 2 nn.Parameter", "MLP", targets("lin0", target_parameters=["lin1.weight"])),
    ("Conv1D 1", "EmbConv1D", targets("conv1d")),
    ("Embedding", "EmbConv1D", targets("emb")),
    ("Embedding + Conv1D", "EmbConv1D", targets("emb", "conv1d")),
    ("Conv1D DoRA", "EmbConv1D", targets("conv1d", **DORA)),
    ("Embedding DoRA", "EmbConv1D", targets("emb", **DORA)),
    ("Embedding + Conv1D DoRA", "EmbConv1D", targets("emb", "conv1d", **DORA)),
    (
        "Conv1D and tokens",
        "EmbConv1D",
        targets("conv1d", trainable_token_indices={"emb": [0, 10]}),
    ),
    ("Conv1d", "Conv1d", targets("conv1d")),
    ("Conv1d DoRA", "Conv1d", targets("conv1d", **DORA)),
    ("Conv2d 1", "Conv2d", targets("conv2d")),
    ("Conv2d 2", "Conv2d", targets("conv2d", "lin0")),
    ("Conv2d 1 DoRA", "Conv2d", targets("conv2d", **DORA)),
    ("Conv2d 2 DoRA", "Conv2d", targets("conv2d", "lin0", **DORA)),
    ("Conv2d bias", "Conv2d", targets("conv2d", **BIAS)),
    ("Conv2d Groups", "Conv2dGroups", targets("conv2d")),
    ("Conv2d Groups DoRA", "Conv2dGroups", targets("conv2d", **DORA)),
    ("Conv2d Groups2", "Conv2dGroups2", targets("conv2d")),
    ("Conv2d Groups2 DoRA", "Conv2dGroups2", targets("conv2d", **DORA)),
    ("Conv3d 1", "Conv3d", targets("conv3d")),
    ("Conv3d 2", "Conv3d", targets("conv3d", "lin0")),
    ("Conv3d 1 DoRA", "Conv3d", targets("conv3d", **DORA)),
    ("Conv3d 2 DoRA", "Conv3d", targets("conv3d", "lin0", **DORA)),
    ("Conv3d bias", "Conv3d", targets("conv3d", **BIAS)),
    ("MHA 1", "MHA", targets("mha")),
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
]
#: What changes the base weight or is drawn anew on each call, with the field that messages name.
REFUSED = [
    ("KaSA", targets("lin0", kasa_config=KasaConfig(), r=4), "kasa_config"),
    (
        "MonteCLoRA",
        targets("lin0", monteclora_config=MontecloraConfig(num_samples=2)),
        "monteclora",
    ),
]


@dataclass
class Served:
    """A model with the adapters of all its cases."""

    base: nn.Module
    folders: dict[str, Path]
    cm: Any
    alone: dict[str | None, nn.Module] = field(default_factory=dict)

    def expected(self, names: list[str | None], x: Tensor) -> Tensor:
        for name in names:
            if name not in self.alone:
                self.alone[name] = self.base if name is None else self._by_peft(name)
        with torch.no_grad():
            return torch.cat([self.alone[n](row[None]) for n, row in zip(names, x, strict=True)])

    def _by_peft(self, name: str) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = PeftModel.from_pretrained(copy.deepcopy(self.base), str(self.folders[name]))
        return twin.eval()


@torch.no_grad()
def save(base: nn.Module, folder: Path, seed: int, config: dict[str, Any]) -> Path:
    """The case's adapter by PEFT, with noise in all that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            trained = parameter.requires_grad or "lora_" in name
            if not trained or "velora" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            else:
                parameter.add_(0.3 * noise)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    compiled: dict[str, Served] = {}

    def of(model: str) -> Served:
        if model not in compiled:
            torch.manual_seed(0)
            base = MODELS[model]().eval().requires_grad_(False)
            folder = tmp_path_factory.mktemp(model)
            cases = [(name, config) for name, own, config in SERVED if own == model]
            folders = {
                name: save(base, folder / str(seed), seed, config)
                for seed, (name, config) in enumerate(cases)
            }
            config = lorafx.LoraConfig(max_adapters=max(8, len(cases)))
            cm = lorafx.compile(
                copy.deepcopy(base), config, adapters=folders, options={"lowering": "reference"}
            )
            compiled[model] = Served(base, folders, cm)
        return compiled[model]

    return of


@pytest.mark.parametrize(("name", "model"), [case[:2] for case in SERVED], ids=lambda v: v)
def test_a_case_beside_others(name: str, model: str, served: Callable[[str], Served]) -> None:
    case = served(model)
    others = [other for other in case.folders if other != name]
    names = [name, None, *others[:1], name, *others[-1:]]
    torch.manual_seed(1)
    x = torch.randn(len(names), *SIZES[model])
    if model == "EmbConv1D":
        x = torch.randint(0, 12, (len(names), 10))
    want = case.expected(names, x)
    oracle.assert_close(case.cm(x, adapter_names=names), [want])
    unchanged = case.expected([None] * len(names), x)
    assert oracle.difference([want[:1]], [unchanged[:1]]) > 1e-4
    oracle.assert_close(case.cm(x[:1], adapter_names=[name]), [want[:1]])


ALONE = [case for case in SERVED if "lin0" not in case[2].get("target_modules", ())]


@pytest.mark.parametrize(
    ("name", "model", "config"),
    [case for case in ALONE if case[1].startswith("Conv")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_convolution_without_max_rank(
    name: str, model: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing but the adapter's own file says its rank."""
    torch.manual_seed(0)
    base = MODELS[model]().eval().requires_grad_(False)
    folders = {name: save(base, tmp_path / "saved", 1, config)}
    options = {"lowering": "reference"}
    cm = lorafx.compile(copy.deepcopy(base), adapters=folders, options=options)
    case, x = Served(base, folders, cm), torch.randn(11, *SIZES[model])
    names = [name, None] * 5 + [name]
    oracle.assert_close(cm(x, adapter_names=names), [case.expected(names, x)])


@pytest.mark.parametrize(("config", "field"), [case[1:] for case in REFUSED])
def test_what_is_refused(config: dict[str, Any], field: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS["MLP"]().eval().requires_grad_(False)
    folder = save(base, tmp_path, 0, config)
    with pytest.raises(UnsupportedAdapterError, match=field):
        lorafx.compile(base, {"a": folder})
