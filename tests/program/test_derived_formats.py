"""Base weights in formats of their own, used past their modules."""

from __future__ import annotations

import copy

import pytest
import torch
from absorbed import parts
from dense_merge import REFERENCE, Case, check_mixed, save_adapter
from torch import Tensor, nn

import lorafx
from lorafx.layers import ReplicatedLinear
from lorafx.layers.base import Int8ChannelLinearMethod

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
    stored.kv_b_proj.load_weight("weight", torch.randn(stored.kv_b_proj.weight.shape) * 0.5)
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
