"""Adapters in PEFT's format for modules that PEFT itself cannot wrap or name: saved by hand.

    ΔW = s · B A,  s = 2,  A (r, K), B (N, r);   embeddings: A (r, V), B (D, r), ΔE = s · (B A)ᵀ

A `Case` made here has its oracle too: copies of the base with W + ΔW, in which no two modules share
a weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import oracle
import torch
from dense_merge import Case
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafx import layers

SCALE = 2


def is_embedding(module: nn.Module) -> bool:
    """Whether the module looks rows of W (V, D) up."""
    looks_up = isinstance(module, (nn.Embedding, layers.VocabParallelEmbedding))
    return looks_up and not isinstance(module, layers.ParallelLMHead)


def factors(
    base: nn.Module, paths: Sequence[str], *, rank: int, seed: int, gain: float = 0.5
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, K) and B (N, r) by path, for modules that hold a 2-D `weight`; ΔW has `gain` beside a
    weight of unit gain."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path in paths:
        module = base.get_submodule(path)
        n, k = module.weight.T.shape if is_embedding(module) else module.weight.shape
        fan_in = rank if is_embedding(module) else k
        a = torch.randn(rank, k, generator=generator) * fan_in**-0.5 * (gain / SCALE)
        found[path] = (a, torch.randn(n, rank, generator=generator) * rank**-0.5)
    return found


def save(
    base: nn.Module, folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], **config: Any
) -> Path:
    """Write the factors to `folder` under the names that `pairs` gives, as PEFT would."""
    tensors = {}
    for path, (a, b) in pairs.items():
        module = base.get_submodule(path)
        form = "lora_embedding_{}" if is_embedding(module) else "lora_{}.weight"
        for letter, tensor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{path}.{form.format(letter)}"] = tensor.contiguous().clone()
    rank = max(a.shape[0] for a, _ in pairs.values())
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": list(pairs),
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def random_factors(folder: Path, key: str, rows: int, width: int = 16) -> Path:
    """An adapter of rank 2 with factors of `rows` outputs at one path, whatever is there."""
    module = nn.Linear(width, rows, bias=False)
    model = nn.Module()
    model.get_submodule = lambda path: module  # type: ignore[method-assign]
    return save(model, folder, {key: (torch.randn(2, width), torch.randn(rows, 2))})


@torch.no_grad()
def merged(base: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of `base`, untied, with W + ΔW in the modules that `pairs` names."""
    twin = oracle.untied_copy(base)
    for path, (a, b) in pairs.items():
        module = twin.get_submodule(path)
        delta = SCALE * (b @ a)
        module.weight += delta.T if is_embedding(module) else delta
    return twin


def hand_case(base: nn.Module, folder: Path, **targets: Sequence[str]) -> Case:
    """A `Case` with one adapter for each keyword, at the paths that it lists; ranks are unequal."""
    for module in base.modules():  # eval() does not end where a child holds its parent
        module.training = False
    base.requires_grad_(False)
    case = Case(base, {})
    for index, (name, paths) in enumerate(targets.items()):
        pairs = factors(base, paths, rank=2 + index, seed=index)
        case.folders[name] = save(base, folder / name, pairs)
        case.merged[name] = merged(base, pairs)
    return case
