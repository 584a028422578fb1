"""Tensors made of weights, of which load_weights has to know: none keeps old numbers unsaid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, save_adapter
from expert_models import moe_base
from namings import new_weights, plain
from tiny_models import FAMILIES
from torch import Tensor, nn

import lorafx
from lorafx.errors import BaseWeightsError
from lorafx.program.derived import Holder
from lorafx.weights.copies import outdated_copies

pytestmark = pytest.mark.usefixtures("fixed_sizes")

WIDTH = 32


def compiled(model: nn.Module, targets: tuple[str, ...] = ("o",)) -> Any:
    return lorafx.compile(model, lorafx.LoraConfig(target_modules=list(targets)), options=REFERENCE)


class Fused(nn.Module):
    """Multiplies by q and k at once, by a matrix that was made of both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.how = how
        self.fuse()

    def fuse(self) -> None:
        q, k = self.q.weight.detach(), self.k.weight.detach()
        if self.how == "rows":
            self.fused = torch.cat([q, k])
        elif self.how == "padded":
            self.fused = 2 * torch.cat([q, k, torch.zeros(8, WIDTH)])
        else:
            self.fused = torch.cat([q @ k, q + k])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k = F.linear(x, self.fused)[..., : 2 * WIDTH].chunk(2, -1)
        y = torch.tanh(q) * torch.sigmoid(k)
        return {"logits": self.o(y)}


def seeded(build: Any, *arguments: Any) -> Any:
    torch.manual_seed(1)
    return build(*arguments).eval().requires_grad_(False)


@pytest.mark.parametrize("how", ["rows", "padded", "products"])
def test_made_of_several_weights(how: str, tmp_path: Path) -> None:
    """Refused by name. A call shows that `o` is used as it is."""
    model = seeded(Fused, how)
    cm = compiled(model, ("q", "k", "o"))
    x = torch.randn(2, 3, WIDTH)
    cm.load_adapter(save_adapter(model, tmp_path, rank=2, targets=["o"]), "a")
    cm(x, adapter_names=["a", None])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = new_weights(model, 3)
    state = plain(fresh)
    with pytest.raises(
        BaseWeightsError, match=r"q.weight, k.weight: fused .*would keep the old ones"
    ):
        cm.load_weights(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    cm.load_weights({"o.weight": state["o.weight"]}, strict=False)


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    **{name: FAMILIES[name].build for name in ("gpt2",)},
    "deepseek_v3": lambda: moe_base("deepseek_v3"),
}


@pytest.mark.parametrize("family", ORDINARY)
def test_ordinary_models_hold_no_copies(family: str) -> None:
    """Masks, rotary tables and positions are none, also before there are weights."""
    model = ORDINARY[family]().eval().requires_grad_(False)
    fresh = plain(new_weights(model, 3))
    cm = lorafx.compile(model, lorafx.LoraConfig(), options=REFERENCE)
    program = cm._session.program
    holders = [Holder(site.path, site.module, site.eligible.weight) for site in program.sites]
    assert outdated_copies(program, holders) == []
    cm.load_weights(fresh)
    assert all(torch.equal(t, fresh[name]) for name, t in model.state_dict().items())
