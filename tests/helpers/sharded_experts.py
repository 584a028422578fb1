"""Routed experts cut among ranks, adapters of them in every form that files have, and what a rank
does with both; see `two_ranks`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import oracle
import torch
from expert_models import write
from hand_made import SCALE
from torch import Tensor, nn

import lorafx
from lorafx.layers import FusedMoE, ReplicatedLinear, load_weights

E, K, H, I = 5, 2, 6, 8  # noqa: E741


class Routed(nn.Module):
    """x (T, H) → the same: a router and its experts, beside what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(H, E, bias=False)
        self.experts = FusedMoE(E, K, H, I)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x, self.gate(x))


def base() -> nn.Module:
    """One rank's model with random weights, the same every time."""
    torch.manual_seed(0)
    model = Routed().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    return model


def adapters(model: nn.Module, folder: Path) -> tuple[dict[str, Path], dict[str, nn.Module]]:
    """Folders by name, and copies of `model` with W + ΔW."""
    folders, merged = {}, {}
    parameters = ["experts.w13_weight", "experts.w2_weight"]
    peft = {"all": [*parameters, "gate.weight"], "down": parameters[1:], "up": parameters[:1]}
    for seed, (name, wanted) in enumerate(peft.items()):
        folders[name] = oracle.save_adapter(
            model, folder / name, rank=2 + seed, targets=[], seed=seed, target_parameters=wanted
        )
        merged[name] = oracle.merged(model, folders[name])
    for name, make in {"each": _each, "stacked": _stacked}.items():
        merged[name] = copy.deepcopy(model)
        tensors = make(merged[name])
        settings = {"r": 3, "lora_alpha": 3 * SCALE, "target_modules": ["experts"]}
        folders[name] = write(folder / name, tensors, **settings)
    return folders, merged


@torch.no_grad()
def _each(model: nn.Module) -> dict[str, Tensor]:
    """A tensor an expert and projection, of some experts."""
    tensors = {}
    for expert in (0, 3, 4):
        for name, rows, width in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
            if (expert, name) == (3, "up_proj"):
                continue
            a, b = _pair((3, width), (rows, 3))
            tensors |= _saved(f"experts.{expert}.{name}", a, b)
            start = I if name == "up_proj" else 0
            down = name == "down_proj"
            weight = model.experts.w2_weight if down else model.experts.w13_weight
            weight[expert, start : start + rows] += SCALE * b @ a
    return tensors


@torch.no_grad()
def _stacked(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of all experts; the gates and the ups apart, and one A for all downs."""
    tensors = {}
    for half, name in enumerate(("gate_proj", "up_proj")):
        a, b = _pair((E, 3, H), (E, I, 3))
        tensors |= _saved(f"experts.{name}", a, b)
        model.experts.w13_weight[:, half * I : (half + 1) * I] += SCALE * b @ a
    a, b = _pair((3, I), (E, H, 3))
    model.experts.w2_weight += SCALE * b @ a
    return {**tensors, **_saved("experts.w2", a, b)}


def _pair(a: Sequence[int], b: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(*a) * 0.3, torch.randn(*b) * 0.3


def _saved(path: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


@torch.no_grad()
def run(
    rank: int,
    size: int,
    state: Mapping[str, Tensor],
    folders: Mapping[str, Path],
    batches: Sequence[tuple[Tensor, list[str | None]]],
    options: dict[str, Any],
    warm: bool,
) -> dict[str, Any]:
    """What a rank computes for the batches, and for the first one with each adapter merged; with
    `warm` after a warm-up, and how often a graph was captured since."""
    model = Routed().eval()
    load_weights(model, state)
    cm = lorafx.compile(model, folders, options=options)
    if warm:
        cm.warmup(example_inputs={"x": batches[0][0]}, batch_sizes=(1, len(batches[0][1])))
    captured = cm.recompiles
    found: dict[str, Any] = {"mixed": [cm(x, adapter_names=names) for x, names in batches]}
    found["captured"] = cm.recompiles - captured
    found["sizes"] = {
        site.path: (site.in_features, [part.out_features for part in site.parts])
        for site in cm.sites
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found["merged"] = {}
    for name in folders:
        cm.merge(name)
        found["merged"][name] = cm(batches[0][0])
        cm.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    try:
        cm.export_merged(next(iter(folders)), "never written")
    except lorafx.MatchError as error:
        found["export"] = str(error)
    return found
