"""Changes that have a structure, over bases that a library has quantised ("QOFT"): its kernels as
they are, which read the inputs that adapters turn. The oracle merges into the dequantised base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, error, random_base
from method_files import merged, save
from packed_integers import AwqLinear, PackedLinear
from quantised import KINDS, SIZES, Rounded, linears
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
# Quick for torchao are mixed batches of LoRA, in tests/model/test_quantized.py.
FAST = ("bitsandbytes-nf4",)
SLOW = (
    "torchao-int8",
    "torchao-int4-packed",
    "torchao-int8-dynamic",
    "torchao-int4-groups",
    "bitsandbytes-8",
    "awq",
)
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


@contextmanager
def registered(cls: type[PackedLinear]) -> Iterator[None]:
    lorafx.register(cls, dequantize=PackedLinear.dequantized)
    yield
    lorafx.unregister(cls)


@registered(AwqLinear)
@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_structures_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    """Mixed batches in a graph, and each alone where the module itself is called."""
    case, tolerance = quantised(kind, tmp_path), KINDS[kind][1]
    cm = case.compile()
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
    model = lorafx.attach(copy.deepcopy(case.model), case.folders, options=REFERENCE)
    for name in (*ADAPTERS, None):
        with torch.no_grad(), lorafx.adapters(model, [name] * 4):
            got = model(**INPUTS).logits
        assert error(got, case.expected([name] * 4)) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4-packed"])
def test_generated_products_read_turned_inputs(kind: str, tmp_path: Path) -> None:
    case, names = quantised(kind, tmp_path), ["oft", "lora", "ia3", None]
    got = case.compile(lowering="inductor")(**INPUTS, adapter_names=names).logits
    assert error(got, case.expected(names)) <= 1e-5


def test_merged_into_a_quantised_base(tmp_path: Path) -> None:
    """W' is rounded to the base's format: by half a step of float16's scales, and its bias kept."""
    case = quantised("bitsandbytes-8", tmp_path)
    cm = case.compile()
    for name in ("oft", "lokr"):
        cm.merge(name, requantize=True)
        for path, linear in linears(merged(case.dense, case.folders[name])):
            step = linear.weight.abs().amax(1, keepdim=True) / 127
            served = lorafx.dequantize(cm._orig_mod.get_submodule(path))
            assert ((served - linear.weight) / step).abs().max() < 0.55
        cm.unmerge()
    with pytest.raises(lorafx.MatchError, match="k_proj: the adapter has a bias of its own"):
        cm.merge("ia3", requantize=True)


def test_whole_weights_are_refused(tmp_path: Path) -> None:
    case = quantised("torchao-int8", tmp_path)
    hira = save(case.dense, peft.HiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "hira")
    refused = "q_proj.* cannot have a weight of .*own.*: its weight is quantised"
    with pytest.raises(lorafx.TargetError, match=refused):
        lorafx.compile(copy.deepcopy(case.model), {"hira": hira})
    with pytest.raises(lorafx.UnsupportedAdapterError, match=refused):
        case.compile().load_adapter(str(hira), "hira")


class BrokenLinear(AwqLinear):
    """Its product is not in the graph of its mark."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y


@pytest.mark.one_road
@registered(BrokenLinear)
def test_a_graph_break_in_the_call_of_the_module(tmp_path: Path) -> None:
    """Only a graph refuses it."""
    dense, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(2, 64)
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"])
    folders = {"oft": save(dense, config, tmp_path / "oft")}
    model = nn.Sequential(BrokenLinear(dense[0]))
    cm = lorafx.compile(model, folders, options={**REFERENCE, "cache": None})
    with pytest.raises(
        lorafx.MatchError, match=r"its weight is quantised, and a .* modules_to_save"
    ):
        cm(x, adapter_names=["oft", None])
    eager = {**REFERENCE, "cache": None, "start": "eager"}
    cm = lorafx.compile(nn.Sequential(BrokenLinear(dense[0])), folders, options=eager)
    got, changed = cm(x, adapter_names=["oft", None]), merged(dense, folders["oft"])
    turn = torch.linalg.solve(dense[0].weight.double(), changed[0].weight.double())
    assert error(got[0], x[0].double() @ (model[0].dequantized().double() @ turn).mT) <= 1e-4
    assert torch.equal(got[1], model(x)[1])
