"""DoRA on the kinds of modules and uses that there are; what is refused, for DoRA alone."""

from __future__ import annotations

import json
from pathlib import Path

import hand_made
import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, TOLERANCE, check_mixed, error
from dora_cases import add_magnitudes, dora_case, rescaled_weight, saved_tensors
from packed_models import twins
from quantised import KINDS
from torch import Tensor, nn

import lorafx
from lorafx.errors import UnsupportedAdapterError
from lorafx.layers import FusedMoE, load_weights
from lorafx.layers.base import ShardSizes, TensorParallel
from lorafx.layers.linear import LinearBase

pytestmark = pytest.mark.quick

NAMES = ["d0", None, "p2", "d3"]


def test_parts_of_packed_projections(tmp_path):
    """q, k, gate and half of a mixer, each on its own part of a packed weight."""
    apart, packed = twins()
    targets = {
        "d0": ["q_proj", "gate_proj", "in_proj_z"],
        "p2": ["v_proj", "o_proj"],
        "d3": ["k_proj", "up_proj", "in_proj_qkv", "o_proj"],
    }
    case = dora_case(apart, tmp_path, targets)
    cm = lorafx.compile(packed, case.folders, options=REFERENCE)
    check_mixed(cm, case, NAMES, {"input_ids": torch.arange(20).view(4, 5)})


class Uses(nn.Module):
    """One linear after a plain one, its weight used in all ways of which the bias is another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.w = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, weight = torch.tanh(self.first(x)), self.w.weight
        ways = (
            F.linear(h * 0.5, weight, self.w.bias),
            F.linear(h * 0.3, weight),
            h @ weight.T + self.first.bias[0],
            (weight @ (h * 0.7).mT).mT + self.w.bias,
            self.w(h * 0.9) + 1,
        )
        return {"logits": torch.cat(ways, dim=-1)}


def test_weights_used_without_their_module(tmp_path):
    torch.manual_seed(0)
    base = Uses().eval().requires_grad_(False)
    case = dora_case(base, tmp_path, {"d0": ["w"], "d3": ["first", "w"], "p2": ["w"]})
    cm = case.compile()
    check_mixed(cm, case, NAMES, {"x": torch.randn(4, 3, 6)})


class Wrapped(nn.Module):
    def __init__(self, w: nn.Module) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.w(x)}


def dora_file(folder: Path, n: int, k: int) -> Path:
    """An adapter with random magnitudes at "w", which is (n, k)."""
    base = Wrapped(nn.Linear(k, n, bias=False))
    hand_made.save(base, folder, hand_made.factors(base, ["w"], rank=2, seed=0))
    add_magnitudes(folder, {"w": torch.rand(n) + 0.5})
    return folder


def merged_with(weight: Tensor, folder: Path) -> Tensor:
    """W' of a `dora_file`."""
    state = saved_tensors(folder)
    pair = [state[f"base_model.model.w.lora_{letter}.weight"] for letter in "AB"]
    return rescaled_weight(weight, pair, state["base_model.model.w.lora_magnitude_vector"])


def by_torchao() -> nn.Module:
    KINDS["torchao-int8"][0](model := Wrapped(nn.Linear(6, 9)).eval().requires_grad_(False))
    return model


def test_a_quantised_base(tmp_path):
    """The norm is that of the numbers that the module computes with."""
    torch.manual_seed(0)
    model = by_torchao()
    folder = dora_file(tmp_path / "d", 9, 6)
    cm, x = (
        lorafx.compile(model, {"d": folder}, options=REFERENCE),
        torch.randn(2, 3, 6),
    )
    weight = lorafx.dequantize(model.w)
    got = cm(x=x, adapter_names=["d", None])["logits"]
    want = F.linear(x[:1], merged_with(weight, folder), model.w.bias)
    assert error(got[:1], want) <= TOLERANCE
    assert error(got[1:], F.linear(x[1:], weight, model.w.bias)) <= TOLERANCE


def rank_of_two(rank: int, *, row: bool = False, bias: bool = False) -> nn.Module:
    """A rank's share of a linear (8, 6); what the ranks' collectives do is left out."""
    tp = TensorParallel(2, rank, "none")
    parts = (6, [8], 3, [8]) if row else (6, [8], 6, [4])
    return Wrapped(LinearBase(ShardSizes(*parts), bias, tp, {})).eval().requires_grad_(False)


def test_outputs_that_ranks_share(tmp_path):
    torch.manual_seed(0)
    folder, weight, x = dora_file(tmp_path / "d", 8, 6), torch.randn(8, 6), torch.randn(2, 3, 6)
    found = []
    for rank in range(2):
        model = rank_of_two(rank)
        load_weights(model, {"w.weight": weight})
        cm = lorafx.compile(model, {"d": folder}, options=REFERENCE)
        found.append(cm(x=x, adapter_names=["d", None])["logits"])
    got = torch.cat(found, -1)
    assert error(got[:1], F.linear(x[:1], merged_with(weight, folder))) <= TOLERANCE
    assert error(got[1:], F.linear(x[1:], weight)) <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: rank_of_two(0, row=True), "over all inputs, which several ranks share"),
        (lambda: rank_of_two(0, bias=True), "its bias is added inside the rank's own product"),
    ],
    ids=["row", "bias"],
)
def test_what_is_refused_by_name(model, message, tmp_path):
    """For DoRA adapters only, and before anything has changed."""
    folder = dora_file(tmp_path / "d", 8, 6)
    config = lorafx.LoraConfig(target_modules=["w"], use_dora=True)
    cm = lorafx.compile(model(), config, options=REFERENCE)
    with pytest.raises(UnsupportedAdapterError, match=rf"w.*{message}"):
        cm.load_adapter(folder, "d")
    assert cm.adapters == ()
    as_plain = json.loads((folder / "adapter_config.json").read_text())
    del as_plain["use_dora"]
    (folder / "adapter_config.json").write_text(json.dumps(as_plain))
    with pytest.raises(UnsupportedAdapterError, match="but use_dora is not set"):
        cm.load_adapter(folder, "d")


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = FusedMoE(4, 2, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, x[..., :4])


def test_experts_are_refused_by_name(tmp_path):
    folder = hand_made.random_factors(tmp_path / "d", "experts", 6, 8)
    add_magnitudes(folder, {"experts": torch.rand(6)})
    config = lorafx.LoraConfig(target_modules="experts.*", use_dora=True)
    cm = lorafx.compile(Routed().eval(), config, options=REFERENCE)
    with pytest.raises(UnsupportedAdapterError) as caught:
        cm.load_adapter(folder, "d")
    assert "use_dora is set with factors of routed experts (experts)" in str(caught.value)
    assert "lora_magnitude_vector: DoRA on routed experts" in str(caught.value)
