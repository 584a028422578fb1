"""Changes that have a structure, over bases that a library has quantised ("QOFT"): its kernels as
they are, which read the inputs that adapters turn. The oracle merges into the dequantised base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, error, random_base
from method_files import merged, save
from packed_integers import AwqLinear, PackedLinear
from quantised import KINDS, SIZES, Rounded
from torch import Tensor, nn

import lorafx

ADAPTERS: Mapping[str, peft.PeftConfig] = {
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "lora": peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    "road": peft.RoadConfig(group_size=4, target_modules=["v_proj"]),
    "lokr": peft.LoKrConfig(r=99, decompose_factor=4, target_modules=["o_proj", "down_proj"]),
    "beft": peft.BeftConfig(target_modules=["q_proj", "v_proj"]),
}
INPUTS = {"input_ids": torch.randint(3, 61, (4, 5), generator=torch.Generator().manual_seed(5))}


@dataclass
class Quantised:
    """A quantised model, the dense one of its numbers, and adapters."""

    model: nn.Module
    dense: nn.Module
    folders: dict[str, Path]

    def compile(self, **options: Any) -> Any:
        model = copy.deepcopy(self.model)
        return lorafx.compile(model, self.folders, options={**REFERENCE, "cache": None, **options})

    def expected(self, names: list[str | None]) -> Tensor:
        """Each row alone."""
        rows = []
        for name, ids in zip(names, INPUTS["input_ids"].split(1), strict=True):
            twin = self.dense if name is None else merged(self.dense, self.folders[name])
            with torch.no_grad():
                rows.append(twin(ids).logits)
        return torch.cat(rows)


def quantised(kind: str, root: Path) -> Quantised:
    base = random_base("llama", **SIZES, attention_bias=True)
    folders = {name: save(base, config, root / name) for name, config in ADAPTERS.items()}
    model = copy.deepcopy(base)
    KINDS[kind][0](model)
    model.eval().requires_grad_(False)
    return Quantised(model, Rounded(base, model, {}).dense().base, folders)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    lorafx.register(AwqLinear, dequantize=PackedLinear.dequantized)
    yield
    lorafx.unregister(AwqLinear)


@pytest.mark.parametrize("start", ["eager", "compiled"])
@pytest.mark.parametrize(
    "kind",
    [
        "torchao-int8",
        "torchao-int4-packed",
        "bitsandbytes-nf4",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "torchao-int8-dynamic",
                "torchao-int4-groups",
                "bitsandbytes-8",
                "awq",
            )
        ),
    ],
)
def test_mixed_batches_of_structures(kind: str, start: str, tmp_path: Path) -> None:
    case, tolerance = quantised(kind, tmp_path), KINDS[kind][1]
    cm = case.compile(start=start)
    with torch.no_grad():
        assert torch.equal(cm(**INPUTS).logits, case.model(**INPUTS).logits)
    beside = cm(**INPUTS, adapter_names=["lora", "lora", "lora", None]).logits
    base = case.expected([None] * 4)
    for names in (["oft", "lora", "ia3", None], ["road", "oft", "lokr", "beft"]):
        got = cm(**INPUTS, adapter_names=names).logits
        assert error(got, case.expected(names)) <= tolerance
        for row, name in enumerate(names):
            if name is not None:
                assert error(got[row], base[row]) > 2 * tolerance
            elif kind != "bitsandbytes-8":  # it looks for outliers in the whole batch
                assert torch.equal(got[row], beside[row])
