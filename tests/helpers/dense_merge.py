"""Cases: a tiny base model, five adapters on disk, and the dense-merge oracle (see `oracle`)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import torch
from tiny import randomise
from tiny_models import FAMILIES, RANKS, Family
from torch import Tensor, nn

import lorafx

REFERENCE = {"lowering": "reference"}
TOLERANCE = oracle.TOLERANCE


@dataclass(eq=False)
class Case:
    """A base model, its adapters on disk, and copies of the base with one merged into each."""

    base: nn.Module
    folders: dict[str, Path]
    merged: dict[str | None, nn.Module] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """A copy of the base that a test may compile and change."""
        return copy.deepcopy(self.base)

    def compile(self, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The base compiled with all adapters, by the reference lowering unless said otherwise."""
        return lorafx.compile(
            self.model(), self.folders, options={**REFERENCE, **(options or {})}, **kwargs
        )

    def alone(self, name: str | None) -> nn.Module:
        """The base with `name` merged densely into it."""
        if name is None or name == "__base__":
            return self.base
        if name not in self.merged:
            self.merged[name] = oracle.merged(self.base, self.folders[name])
        return self.merged[name]

    def expected(self, names: Sequence[str | None], inputs: Mapping[str, Tensor]) -> Tensor:
        """(rows, ...) logits, each row alone on its own merged copy."""
        rows = []
        for index, name in enumerate(names):
            with torch.no_grad():
                output = self.alone(name)(**oracle.one_row(inputs, index))
            rows.append(oracle.tensors(output)[0])
        return torch.cat(rows)


class PeftCase(Case):
    """A case whose oracle is what PEFT's own model of a row's adapter gives."""

    def alone(self, name: str | None) -> nn.Module:
        if name not in self.merged:
            self.merged[name] = oracle.by_peft(self.base, self.folders[name] if name else None)
        return self.merged[name]


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest of 1 and the expected magnitude."""
    return oracle.difference([got], [want])


def valid(inputs: Mapping[str, Tensor], tensor: Tensor) -> Tensor:
    """The entries of (rows, length, ...) `tensor` that are not padding."""
    mask = inputs.get("attention_mask")
    if mask is None or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask.bool()]


def check_mixed(
    cm: Any, case: Case, names: Sequence[str | None], inputs: Mapping[str, Tensor]
) -> None:
    """A batch of `cm` with these adapters is the oracle's, and each adapter did change its row."""
    (got,) = oracle.tensors(cm(**inputs, adapter_names=names))
    want = case.expected(names, inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    base = case.expected([None] * len(names), inputs)
    for row, name in enumerate(names):
        if name not in (None, "__base__"):
            assert error(want[row], base[row]) > 100 * TOLERANCE


def random_base(family: str | Family, **changes: Any) -> nn.Module:
    """A tiny model with unit-gain random weights, the same every time."""
    family = FAMILIES[family] if isinstance(family, str) else family
    torch.manual_seed(0)
    model = family.build(**changes).eval().requires_grad_(False)
    randomise(model)
    return model


def save_adapter(
    base: nn.Module, folder: Path, *, rank: int, targets: str | Sequence[str], **config: Any
) -> Path:
    """`oracle.save_adapter` of the modules that dotted suffixes, a pattern or "all-linear" name."""
    return oracle.save_adapter(base, folder, rank=rank, targets=_paths(base, targets), **config)


def check_bfloat16(
    folder: Path,
    serve: Callable[[nn.Module, dict[str, Path], dict[str, Tensor], list[str | None]], Tensor],
) -> None:
    """What `serve(base, folders, inputs, names)` returns, logits of a Llama in bfloat16, is near to
    fp64 with the weights that bfloat16 can hold: within twice the error that W + ΔW run densely in
    bfloat16 has, row by row."""
    base = random_base("llama").bfloat16()
    exact = random_base("llama").bfloat16().double()
    plans = {"a": ["q_proj", "v_proj", "down_proj"], "b": ["gate_proj", "lm_head", "embed_tokens"]}
    folders = {
        name: save_adapter(exact.float(), folder / name, rank=rank, targets=plans[name])
        for name, rank in (("a", 3), ("b", 8))
    }
    exact.double()
    names = ["a", None, "b", "b", "a"]
    torch.manual_seed(3)
    inputs = {"input_ids": torch.randint(0, 61, (5, 7))}
    got = serve(base, folders, inputs, names).cpu()
    assert got.dtype == torch.bfloat16
    for row, name in enumerate(names):
        ids = inputs["input_ids"][row : row + 1]
        twin = exact if name is None else oracle.merged(exact, folders[name])
        with torch.no_grad():
            true = twin.double()(input_ids=ids).logits[0]
            dense = twin.bfloat16()(input_ids=ids).logits[0]
            exact.double()
        assert error(got[row], true) <= 2 * error(dense, true)


def _paths(base: nn.Module, targets: str | Sequence[str]) -> list[str]:
    linears = oracle.linears(base)
    if isinstance(targets, str):
        return [path for path in linears if targets == "all-linear" or re.fullmatch(targets, path)]
    return [
        path
        for path, _ in base.named_modules()
        if any(path == target or path.endswith(f".{target}") for target in targets)
    ]


def build_case(family: str | Family, folder: Path, **changes: Any) -> Case:
    """The family's tiny base with adapters a0 ... a4 of ranks `RANKS` under `folder`."""
    family = FAMILIES[family] if isinstance(family, str) else family
    base = random_base(family, **changes)
    folders = {
        f"a{seed}": save_adapter(
            base, folder / f"a{seed}", rank=rank, targets=targets, seed=seed, **family.config
        )
        for seed, (rank, targets) in enumerate(zip(RANKS, family.targets, strict=True))
    }
    return Case(base, folders)


def case_by_targets(
    base: nn.Module, folder: Path, targets: Mapping[str, str | Sequence[str]], **config: Any
) -> Case:
    """A case of `base` with an adapter of each name, of ranks 2, 3, ..., with its targets as
    `save_adapter` takes them."""
    folders = {
        name: save_adapter(base, folder / name, rank=rank, targets=own, seed=rank, **config)
        for rank, (name, own) in enumerate(targets.items(), 2)
    }
    return Case(base, folders)
