"""The oracle: for each row, W + ΔW of its adapter merged into a copy of the base, run alone.

    y[b] = f(x[b]; W + s·B A of names[b])

Adapters are made and saved by PEFT and read back from disk. Copies are untied first: an adapter of
a tied `lm_head` changes the head alone, and merging it into the one tensor would change the
embedding as well.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Names = Sequence["str | None"]

#: Largest difference, relative to the largest of 1 and the reference's magnitude.
TOLERANCE = 1e-5


def linears(model: nn.Module) -> list[str]:
    """Paths of the modules that are linears by class and can carry LoRA.

    Of a linear inside of another one, the inner alone: behind a wrapper of the outer one PEFT does
    not find it.
    """
    found = [
        path
        for path, module in model.named_modules()
        if path and isinstance(module, (nn.Linear, Conv1D)) and module.weight.dim() == 2
    ]
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def embeddings(model: nn.Module) -> list[str]:
    """Paths of the token embedding, by transformers' own accessor."""
    try:
        own = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return [path for path, module in model.named_modules() if module is own][:1] * isinstance(
        own, nn.Embedding
    )


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    rank: int,
    targets: Iterable[str],
    gain: float = 0.5,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Make a PEFT adapter with non-zero factors and save it to `folder`.

    `gain` is the size of ΔW beside a weight of unit gain.
    """
    targets = list(targets)
    config = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": _unambiguous(model, targets),
        **config,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with by_present_names(untied_copy(model)) as twin:
            wrapped = get_peft_model(twin, LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" not in name:
                continue
            if "magnitude" in name:  # the norms of the base weight so far
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
                continue
            first = "lora_A" in name or "embedding_A" in name
            fan_in = rank if not first or "embedding" in name else parameter.shape[1]
            std = max(fan_in, 1) ** -0.5 * (1 if first else gain / 2)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return Path(folder)


def _unambiguous(model: nn.Module, targets: list[str]) -> list[str] | str:
    """The list, or a regular expression where PEFT would take an entry as another one's suffix."""
    paths = {path for path, _ in model.named_modules()} - set(targets)
    if any(path.endswith(f".{target}") for target in targets for path in paths):
        return "|".join(re.escape(target) for target in targets)
    return targets


def merged(model: nn.Module, folder: str | Path) -> nn.Module:
    """A copy of `model` with the saved adapter merged into its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with by_present_names(untied_copy(model)) as twin:
            wrapped = PeftModel.from_pretrained(twin, str(folder))
        result = wrapped.merge_and_unload().eval()
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    if tied is not None:  # PEFT sees that the copy is untied; T5's kin scale the head's input by it
        result.config.tie_word_embeddings = tied
    return result


@contextmanager
def by_present_names(model: nn.Module) -> Iterator[nn.Module]:
    """Let PEFT take target names as they are.

    For mixture-of-experts families, which it knows by model type, it turns every target called
    `gate_proj` or `down_proj` into LoRA on the fused experts of transformers 5, also those of
    dense layers and of shared experts.
    """
    config = getattr(model, "config", None)
    known = getattr(config, "model_type", None)
    if known is None:
        yield model
        return
    config.model_type = ""
    try:
        yield model
    finally:
        config.model_type = known


def untied_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which no two module instances share a parameter."""
    twin = copy.deepcopy(model)
    seen: set[int] = set()
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) in seen:
                clone = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module._parameters[name] = clone
            seen.add(id(parameter))
    return twin


def standard_adapters(
    model: nn.Module,
    folder: str | Path,
    routers: Sequence[str] = (),
    experts: Sequence[str] = (),
) -> dict[str, Path]:
    """Adapters of unequal ranks and targets for `model`, on disk, by name.

    "all" has every linear, "odd" every second one, "even" the others, "embed" the token embedding
    with a few linears (only where the model has such an embedding). `routers` and `experts` are
    paths of parameters: all of them are in "all", the routers in "even" too, and the second one of
    each two of the experts in "odd".
    """
    folder = Path(folder)
    every = linears(model)
    plans: dict[str, tuple[int, list[str], list[str]]] = {
        "all": (4, every, [*routers, *experts]),
        "odd": (7, every[1::2] or every, [*experts[1::2]]),
        "even": (3, every[0::2], [*routers]),
    }
    if embeddings(model):
        plans["embed"] = (5, embeddings(model) + every[-2:], [])
    return {
        name: save_adapter(
            model,
            folder / name,
            rank=rank,
            targets=targets,
            seed=seed,
            **({"target_parameters": parameters} if parameters else {}),
        )
        for seed, (name, (rank, targets, parameters)) in enumerate(plans.items())
    }


@dataclass
class Oracle:
    """Merged copies of one base model, by adapter name; None and "__base__" are the base."""

    base: nn.Module
    merged: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, folders: Mapping[str, str | Path]) -> Oracle:
        """Copies of `model`, taken now: compile it afterwards."""
        return cls(
            copy.deepcopy(model), {name: merged(model, path) for name, path in folders.items()}
        )

    def model(self, name: str | None) -> nn.Module:
        return self.base if name in (None, "__base__") else self.merged[name]

    @torch.no_grad()
    def row(self, name: str | None, arguments: Mapping[str, Any], index: int) -> list[Tensor]:
        """The output tensors of request `index`, run alone with its adapter."""
        return tensors(self.model(name)(**one_row(arguments, index)))

    def rows(self, names: Names, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The output tensors of a batch, row by row."""
        rows = [self.row(name, arguments, index) for index, name in enumerate(names)]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def by_peft(base: nn.Module, folder: str | Path | None) -> nn.Module:
    """What PEFT itself makes of a copy of the base and the adapter; without a folder the base."""
    if folder is None:
        return base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return twin.eval().requires_grad_(False)


def one_row(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The arguments of one request, all of which have requests first."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def tensors(output: Any) -> list[Tensor]:
    """The output's main tensors: logits where there are any, else the first tensor."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple):
        return [next(item for item in output if isinstance(item, Tensor))]
    for name in ("logits", "last_hidden_state", "prediction_logits"):
        if isinstance(output.get(name), Tensor):
            return [output[name]]
    return [next(item for item in output.values() if isinstance(item, Tensor))]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest of 1 and the expected magnitude."""
    worst = 0.0
    for have, want in zip(found, expected, strict=True):
        assert have.shape == want.shape, f"shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        have, want = have.detach().double(), want.detach().double()
        # −inf marks tokens that a head excludes; it must be in the same places.
        finite = torch.isfinite(want)
        if not torch.equal(finite, torch.isfinite(have)):
            return float("inf")
        if finite.any():
            scale = max(1.0, float(want[finite].abs().max()))
            worst = max(worst, float((have - want)[finite].abs().max()) / scale)
    return worst


def assert_close(
    found: Any, expected: Sequence[Tensor], tolerance: float = TOLERANCE, label: str = ""
) -> None:
    """The output of a model equals the oracle's tensors."""
    error = difference(tensors(found), expected)
    assert error <= tolerance, f"{label}: differs by {error:.2e}, tolerance {tolerance:.0e}"
