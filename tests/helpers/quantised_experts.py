"""Models whose routed experts are quantised in the ways that users' are, and calls of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, check_mixed, error
from expert_models import MIXED, experts_modules, ids, moe_case
from torch import nn

import lorafx

PARAMETERS = ("gate_up_proj", "down_proj")
#: Who is in a batch: several, one for all, one request, and one whose rows an expert gets first.
BATCHES = (MIXED, ["down"] * 5, ["params"], [None, "older"])


def by_torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        chosen = {r"re:.*experts\.(gate_up|down)_proj": getattr(library, config)()}
        library.quantize_(model, library.FqnToConfig(chosen), filter_fn=None)

    return quantise


def by_groups(model: nn.Module) -> None:
    """Four bits, by groups of 8. `IntxWeightOnlyConfig` takes no 3-D weight, its tensor does."""
    home = "torchao.quantization.quantize_.workflows"
    library = pytest.importorskip(home, reason="torchao is not installed")
    for _, module in list(experts_modules(model)):
        for name in PARAMETERS:
            weight = library.IntxUnpackedToInt8Tensor.from_hp(
                getattr(module, name).data, (1, 1, 8), torch.int4
            )
            setattr(module, name, nn.Parameter(weight, requires_grad=False))


def by_bitsandbytes(kind: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("bitsandbytes.nn.parametrize", reason="no bitsandbytes")
        for _, module in list(experts_modules(model)):
            for name in PARAMETERS:
                library.replace_parameter_4bit(
                    module, name, compress_statistics=True, quant_type=kind
                )

    return quantise


QUANTISED: dict[str, Callable[[nn.Module], None]] = {
    "int8": by_torchao("Int8WeightOnlyConfig"),
    "fp8": by_torchao("Float8WeightOnlyConfig"),
    "int4": by_groups,
    "nf4": by_bitsandbytes("nf4"),
    "fp4": by_bitsandbytes("fp4"),
}


def quantised(base: nn.Module, kind: str, folder: Path) -> tuple[nn.Module, Case]:
    """`base` with quantised experts, and a case whose base has their dequantised numbers."""
    model, twin = copy.deepcopy(base), copy.deepcopy(base)
    QUANTISED[kind](model)
    ((path, experts),) = experts_modules(twin)
    for name in PARAMETERS:
        dense = lorafx.dequantize(model.get_submodule(path), name)
        assert error(dense, getattr(experts, name)) > TOLERANCE
        getattr(experts, name).data.copy_(dense)
    return model, moe_case(base.config.model_type, folder, twin)


def check_calls(cm: Any, case: Case) -> None:
    for names in BATCHES:
        check_mixed(cm, case, names, ids(len(names)))
    given = ids(len(MIXED))["input_ids"]
    length = {"max_new_tokens": 4, "do_sample": False}
    tokens = cm.generate(given, adapter_names=MIXED, **length)
    for row, name in enumerate(MIXED):
        assert torch.equal(
            tokens[row], case.alone(name).generate(given[row : row + 1], **length)[0]
        )
