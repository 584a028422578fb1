"""Routed experts in every form that they are stored, dispatched and activated in, against dense
merge: classes of no library, known by the shapes of what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from dense_merge import Case, check_mixed
from slowly import few
from torch import Tensor, nn
from transformers.integrations import moe

import lorafx
from lorafx.errors import TargetError

pytestmark = pytest.mark.any_sizes

E, K, H, I = 4, 2, 8, 12  # noqa: E741


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


@dataclass(frozen=True)
class Form:
    """How experts are stored and run.

    Attributes:
        dispatch: "sorted", "chosen" or "all", as in lorafx.program.weight_uses; "from the end" is
            "chosen" by -E … -1.
        halves: "stacked", "interleaved", or "" for experts without a gate.
        declared: whether the class says how it stores them, as transformers' classes do.
    """

    dispatch: str
    halves: str = "stacked"
    transposed: bool = False
    bias: bool = False
    activation: Callable[[Tensor], Tensor] = F.silu
    declared: bool = True


FORMS = {
    "sorted, no gate, relu squared": Form("sorted", halves="", activation=relu_squared),
    "sorted, biases, interleaved, transposed": Form(
        "sorted", halves="interleaved", transposed=True, bias=True
    ),
    "chosen from the end": Form("from the end", bias=True),
    "all, transposed, undeclared": Form("all", transposed=True, declared=False),
}


class Routed(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        if form.declared:
            self.is_transposed = form.transposed
            self.is_concatenated = form.halves != "interleaved"
        wide = I if form.halves == "" else 2 * I
        name = "up_proj" if form.halves == "" else "gate_up_proj"
        for param, out, size in ((name, wide, H), ("down_proj", H, I)):
            shape = (size, out) if form.transposed else (out, size)
            self.register_parameter(param, nn.Parameter(torch.randn(E, *shape) * size**-0.5))
            if form.bias:
                bias = nn.Parameter(torch.randn(E, out) * 0.3)
                self.register_parameter(f"{param}_bias", bias)
        self.first = name

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(T, H) → (T, H): Σ_k weights[t, k] · expert chosen[t, k] of x[t]."""
        if self.form.dispatch == "all":
            every = self.product(self.first, x.expand(E, *x.shape), None, None)
            every = self.product("down_proj", self.activated(every), None, None)
            share = torch.zeros_like(x[:, :1].expand(-1, E)).scatter(1, chosen, weights)
            return (every * share.T.unsqueeze(-1)).sum(0)
        experts = chosen.flatten()
        if self.form.dispatch == "from the end":
            experts = experts - E
        if self.form.dispatch in ("chosen", "from the end"):
            y = self.product(self.first, x.repeat_interleave(K, 0), experts, None)
            y = self.product("down_proj", self.activated(y), experts, None)
            return (y * weights.reshape(-1, 1)).view(-1, K, H).sum(1)
        experts, order = experts.sort()
        ends = torch.searchsorted(experts, torch.arange(E), right=True, out_int32=True)
        y = self.product(self.first, x[order // K], experts, ends)
        y = self.product("down_proj", self.activated(y), experts, ends)
        y = y * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, y)

    def product(self, name: str, x: Tensor, experts: Tensor | None, ends: Tensor | None) -> Tensor:
        weight = getattr(self, name)
        weight = weight if self.form.transposed else weight.mT
        bias = getattr(self, f"{name}_bias", None)
        if experts is None:
            return torch.bmm(x, weight)
        if ends is None:
            y = torch.bmm(x.unsqueeze(1), weight[experts]).squeeze(1)
        else:
            y = moe._grouped_mm(x, weight, ends)
        return y if bias is None else y + bias[experts]

    def activated(self, y: Tensor) -> Tensor:
        if self.form.halves == "":
            return self.form.activation(y)
        if self.form.halves == "interleaved":
            return self.form.activation(y[..., ::2]) * y[..., 1::2]
        gate, up = y.chunk(2, -1)
        return self.form.activation(gate) * up


class Block(nn.Module):
    """A linear, a router and its experts, with a residual."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H)
        self.router = nn.Linear(H, E, bias=False)
        self.experts = Routed(form)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.inner(x)
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(K, -1)
        return {"logits": x + self.experts(flat, chosen, weights).view_as(x)}


@pytest.mark.parametrize(
    "name", few(FORMS, "sorted, biases, interleaved, transposed", "all, transposed, undeclared")
)
def test_forms(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Block(FORMS[name]).eval().requires_grad_(False)
    both = [f"experts.{base.experts.first}", "experts.down_proj"]
    case = Case(base, {})
    for seed, (adapter, rank, linears, parameters) in enumerate(
        [("all", 3, ["inner", "router"], both), ("up", 2, [], both[:1]), ("down", 1, [], both[1:])]
    ):
        case.folders[adapter] = oracle.save_adapter(
            base,
            tmp_path / adapter,
            rank=rank,
            targets=linears,
            seed=seed,
            target_parameters=parameters,
        )
    cm = case.compile()
    check_mixed(cm, case, ["all", None, "up", "down"], {"x": torch.randn(4, 3, H)})
    graphs = cm.recompiles
    check_mixed(cm, case, ["down", "all", "all"], {"x": torch.randn(3, 5, H)})
    one_way = torch.randn(1, 1, H).expand(4, 7, H).clone()  # the same experts; the others empty
    check_mixed(cm, case, ["up", "down", None, "all"], {"x": one_way})
    assert cm.recompiles == graphs


class Three(nn.Module):
    """Gate and up as parameters of their own: no class of two that fit."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I))):
            self.register_parameter(name, nn.Parameter(torch.randn(E, *shape)))


def test_other_holders_of_3d_parameters_are_refused_by_what_they_hold() -> None:
    model = nn.Module()
    model.mlp = Three()
    model.head = nn.Linear(H, E)
    with pytest.raises(TargetError, match=r"mlp \(Three\): it holds 3-D .*gate \(4, 12, 8\)"):
        lorafx.compile(model, lorafx.LoraConfig(target_modules=["mlp", "head"]))
