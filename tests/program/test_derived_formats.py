"""Base weights in formats of their own, weights used by groups, what code sees after compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from absorbed import (
    parts,
)
from absorbed_cases import REFERENCE
from dense_merge import Case, check_mixed, save_adapter
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import lorafx
from lorafx.layers import ReplicatedLinear
from lorafx.layers.quantization import Int8ChannelLinearMethod

NAMES = ["a", None, "b", "a", "c"]


class Latent(nn.Module):
    """A small MLA of parallel layers, kv_b_proj in int8; its own oracle when it does not absorb."""

    heads, n, v, latent, width = 3, 4, 5, 12, 8

    def __init__(self, absorb: str) -> None:
        super().__init__()
        self.absorb = absorb
        self.q_proj = nn.Linear(self.width, self.heads * self.n)
        self.kv_a_proj = nn.Linear(self.width, self.latent)
        rows = self.heads * (self.n + self.v)
        method = Int8ChannelLinearMethod()
        self.kv_b_proj = ReplicatedLinear(self.latent, rows, bias=False, quant_method=method)
        self.o_proj = nn.Linear(self.heads * self.v, self.width)

    def parts(self) -> tuple[Tensor, Tensor]:
        w = self.kv_b_proj.quant_method.dequantize(self.kv_b_proj)
        return parts(w, self.heads, self.n, self.v)

    def post_process(self) -> None:
        w_uk, w_uv = self.parts()
        self.w_uk, self.w_uv = w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.heads, self.n))
        c = torch.tanh(self.kv_a_proj(x))
        if self.absorb == "no":
            kv = self.kv_b_proj(c).unflatten(-1, (self.heads, -1))
            k, value = kv.split([self.n, self.v], -1)
            p = torch.softmax(torch.einsum("bthn,bshn->bhts", q, k), -1)
            out = torch.einsum("bhts,bshv->bthv", p, value)
        else:
            if self.absorb == "after loading":
                w_uk, w_uv = self.w_uk, self.w_uv
            else:
                w_uk, w_uv = self.parts()
                w_uv = w_uv.transpose(1, 2)
            scores = torch.einsum("bthn,hnl,bsl->bhts", q, w_uk, c)
            latents = torch.softmax(scores, -1) @ c.unsqueeze(1)
            out = torch.einsum("bhtl,hlv->bthv", latents, w_uv)
        return {"logits": self.o_proj(out.flatten(2))}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, dict]:
    """Latent without absorption, its weight dense: what the int8 weight stands for."""
    torch.manual_seed(0)
    stored = Latent("no").eval().requires_grad_(False)
    stored.kv_b_proj.weight.weight_loader(
        stored.kv_b_proj.weight, torch.randn(stored.kv_b_proj.weight.shape) * 0.5
    )
    dense = copy.deepcopy(stored)
    dense.kv_b_proj = nn.Linear(stored.latent, stored.kv_b_proj.output_size, bias=False)
    dense.kv_b_proj.weight.data = stored.kv_b_proj.quant_method.dequantize(stored.kv_b_proj)
    folder = tmp_path_factory.mktemp("quantised")
    folders = {
        name: save_adapter(dense, folder / name, rank=rank, targets=targets, seed=rank)
        for name, rank, targets in (
            ("a", 2, ["kv_b_proj"]),
            ("b", 3, ["kv_b_proj", "q_proj"]),
            ("c", 4, ["o_proj"]),
        )
    }
    return Case(dense.requires_grad_(False).eval(), folders), stored.state_dict()


@pytest.mark.parametrize("how", ["after loading", "in forward"])
def test_quantised_weights(quantised: tuple[Case, dict], how: str) -> None:
    case, state = quantised
    model = Latent(how).eval()
    model.load_state_dict(state)
    cm = lorafx.compile(model, case.folders, options=REFERENCE, dynamic=False)
    model.post_process()
    check_mixed(cm, case, NAMES, {"x": torch.randn(5, 4, model.width)})
    assert "refused" not in str(cm.explain())


# Weights by groups


class Grouped(nn.Module):
    """DeepSeek-V4's grouped output projection between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 3 * 8)
        self.o_a_proj = DeepseekV4GroupedLinear(8, 3 * 5, n_groups=3)
        self.o_b_proj = nn.Linear(3 * 5, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        grouped = torch.tanh(self.up(x)).unflatten(-1, (3, 8))
        return {"logits": self.o_b_proj(self.o_a_proj(grouped).flatten(2))}


@pytest.mark.slow
def test_grouped_linear_of_transformers(small) -> None:
    case = small(Grouped, ["o_a_proj"], ["o_a_proj", "o_b_proj", "up"])
    cm = case.compile(options={"lowering": "inductor"})
    check_mixed(cm, case, ["a", None, "b", "a"], {"x": torch.randn(4, 3, 6)})
    check_mixed(cm, case, ["b", "a"], {"x": torch.randn(2, 5, 6)})
    forms = {state.site.path: state.form for state in cm._session.backend.records[-1].states}
    assert forms["o_a_proj"] == "rewritten"


# Metadata


def snapshot(model: nn.Module) -> dict[str, object]:
    """What code may look at, by identity: every attribute of every module, and its class."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        found[f"{path}:class"] = module.__class__
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                for key, held in value.items():
                    found[f"{path}:{key}"] = held
            elif not name.startswith("_forward_hooks"):
                found[f"{path}.{name}"] = value
    return found


def test_everything_that_code_may_look_at_is_the_same() -> None:
    torch.manual_seed(0)
    model = Latent("no").eval().requires_grad_(False)
    for module in model.modules():
        module.marked_by_me = object()
    before = snapshot(model)
    keys = list(model.state_dict())
    cm = lorafx.compile(model, lorafx.LoraConfig(), options=REFERENCE)

    def check() -> None:
        after = snapshot(model)
        assert after.keys() == before.keys()
        assert [key for key in before if after[key] is not before[key]] == []
        assert list(model.state_dict()) == keys

    check()
    assert model.kv_b_proj.weight.dtype is torch.int8
    cm.detach()
    check()
