"""Small models whose linears are quantised in the ways that users' are, and the oracle for them.

A quantised weight cannot be merged into: a row's oracle is the library's own kernel on the row
alone plus x ΔWᵀ, added to each linear's output. `dense` is the other one: W + ΔW of the
dequantised weights.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from dense_merge import Case, random_base, save_adapter
from packed_integers import AwqLinear, GptqLinear
from torch import Tensor, nn

import lorafx
from lorafx.layers import Int8ChannelLinearMethod, ReplicatedLinear

#: Sizes that the libraries' block sizes divide.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
#: Kernels that round x to bfloat16 or int8: where x differs in its last bit, y may by this.
ROUNDS = 0.05
ADAPTERS = {
    "a": (4, ["q_proj", "o_proj", "gate_proj", "down_proj"]),
    "b": (3, ["v_proj", "down_proj"]),
}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Paths and linears, all but the head, which libraries leave as it is."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            yield path, module


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def torchao(
    config: str, home: str = "torchao.quantization", **settings: Any
) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        known = {"int4": torch.int4, "groups of 32": library.PerGroup(32)}
        given = {key: known.get(value, value) for key, value in settings.items()}
        chosen = {id(linear) for _, linear in linears(model)}
        library.quantize_(
            model,
            getattr(importlib.import_module(home), config)(**given),
            filter_fn=lambda m, _: id(m) in chosen,
        )

    return quantise


@functools.cache
def int8_products_saturate() -> bool:
    """Whether torch adds pairs of products of int8 in 16 bits, as it does on a CPU without VNNI:
    then the kernel of "torchao-int8-dynamic" gives something else than its weights do."""
    most = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most) != 64 * 127 * 127).any())


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        for path, linear in linears(model):
            place(model, path, make(linear).eval().requires_grad_(False))

    return quantise


def bitsandbytes(cls: str, **settings: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        bias = linear.bias is not None
        module = getattr(library.nn, cls)(linear.in_features, linear.out_features, bias, **settings)
        module.load_state_dict(linear.state_dict(), strict=False)
        return module.to("cpu")  # quantises

    return make


def int8_layer(linear: nn.Linear) -> nn.Module:
    layer = ReplicatedLinear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_method=Int8ChannelLinearMethod(),
    )
    lorafx.layers.load_weights(layer, linear.state_dict())
    return layer


#: How each kind quantises a model in place, and how far its kernel may round.
KINDS: dict[str, tuple[Callable[[nn.Module], None], float]] = {
    "torchao-int8": (torchao("Int8WeightOnlyConfig"), 1e-5),
    "torchao-int8-dynamic": (torchao("Int8DynamicActivationInt8WeightConfig"), ROUNDS),
    "torchao-fp8": (torchao("Float8WeightOnlyConfig"), 1e-5),
    "torchao-int4": (torchao("IntxWeightOnlyConfig", weight_dtype="int4"), 1e-5),
    "torchao-int4-groups": (
        torchao("IntxWeightOnlyConfig", weight_dtype="int4", granularity="groups of 32"),
        1e-5,
    ),
    "torchao-int4-packed": (
        torchao(
            "PrototypeInt4WeightOnlyConfig",
            "torchao.prototype.quantization.int4",
            group_size=32,
            set_inductor_config=False,
        ),
        1e-5,
    ),
    "bitsandbytes-8": (
        replaced(bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
        ROUNDS,
    ),
    "bitsandbytes-8-outliers": (
        replaced(bitsandbytes("Linear8bitLt", has_fp16_weights=False, threshold=2.0)),
        ROUNDS,
    ),
    "bitsandbytes-nf4": (
        replaced(bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32)),
        ROUNDS,
    ),
    "bitsandbytes-fp4": (
        replaced(
            bitsandbytes(
                "Linear4bit",
                quant_type="fp4",
                compute_dtype=torch.float32,
                compress_statistics=False,
                quant_storage=torch.bfloat16,
            )
        ),
        ROUNDS,
    ),
    "gptq": (replaced(GptqLinear), 1e-5),
    "awq": (replaced(AwqLinear), 1e-5),
    "quant_method": (replaced(int8_layer), 1e-5),
}


class Rounded:
    """A quantised model, its adapters, and both oracles."""

    def __init__(self, base: nn.Module, model: nn.Module, folders: dict[str, Path]) -> None:
        self.base, self.model, self.folders = base, model, folders
        self.alone = {name: self._with_delta(folder) for name, folder in folders.items()}

    def rows(self, names: list[str | None], inputs: dict[str, Tensor]) -> Tensor:
        """Each row alone: the library's kernels, and the delta beside them."""
        models = [self.model if name is None else self.alone[name] for name in names]
        with torch.no_grad():
            return torch.cat([m(**oracle.one_row(inputs, i)).logits for i, m in enumerate(models)])

    def dense(self) -> Case:
        """The dequantised model, whose adapters are merged densely."""
        twin = copy.deepcopy(self.base)
        for path, module in twin.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.data.copy_(lorafx.dequantize(self.model.get_submodule(path)))
        return Case(twin, self.folders)

    def _with_delta(self, folder: Path) -> nn.Module:
        model, merged = copy.deepcopy(self.model), oracle.merged(self.base, folder)
        for path, linear in linears(merged):
            delta = linear.weight - self.base.get_submodule(path).weight
            if delta.any():
                place(model, path, WithDelta(model.get_submodule(path), delta.detach()))
        return model


class WithDelta(nn.Module):
    """module(x) + x ΔWᵀ."""

    def __init__(self, module: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.module, self.delta = module, delta

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + F.linear(x, self.delta)


def small_base() -> nn.Module:
    """A Llama of one layer."""
    return random_base("llama", **SIZES)


def adapters(base: nn.Module, folder: Path) -> dict[str, Path]:
    """Adapters of both kinds of target: some modules have one, some none, some two."""
    return {
        name: save_adapter(base, folder / name, rank=rank, targets=targets, seed=rank)
        for name, (rank, targets) in ADAPTERS.items()
    }
