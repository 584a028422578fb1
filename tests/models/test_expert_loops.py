"""Experts in an `nn.ModuleList`, chosen by a router in a Python loop: mixed by row, with DoRA.

    y[t] = Σ_e w[t, e] · down_e(silu(gate_e(x[t])) · up_e(x[t]))        e among the chosen of t

The loops are those of remote code: over all experts (Mixtral), over the chosen ones, which a tensor
names (Qwen), and over counts that numpy has (DeepSeek). The rows that an expert gets are known by
their values only, in eager mode and between graphs; an expert may get none.
"""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from dense_merge import Case, check_mixed
from tiny import randomise
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS, CHOSEN = 16, 24, 5, 2


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OverAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, HIDDEN)
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), CHOSEN, dim=-1)
        return self.combined(x, weights, chosen).view(hidden.shape)

    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for expert in range(EXPERTS):
            choice, token = torch.where(mask[expert])
            rows = self.experts[expert](x[None, token].reshape(-1, HIDDEN))
            y.index_add_(0, token, rows * weights[token, choice, None])
        return y


class OverChosen(OverAll):
    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            choice, token = torch.where(mask[expert].squeeze(0))
            rows = self.experts[expert](x[None, token].reshape(-1, HIDDEN))
            y.index_add_(0, token, rows * weights[token, choice, None])
        return y


class OverCounts(OverAll):
    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        counts = chosen.new_zeros((len(x), EXPERTS)).scatter_(1, chosen, 1).sum(dim=0)
        order = chosen.view(-1).argsort()
        rows, outputs, start = x[order // CHOSEN], [], 0
        for expert, count in enumerate(counts.cpu().numpy()):
            if count:
                outputs.append(self.experts[expert](rows[start : start + count]))
            start += count
        joined = torch.cat(outputs)
        y = torch.empty_like(joined)
        y[order] = joined
        return (y.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, HIDDEN)
        self.mlp, self.head = block, nn.Linear(HIDDEN, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        return self.head(hidden + self.mlp(hidden))


@pytest.mark.parametrize(
    ("block", "start"),
    [
        (OverAll, "compiled"),  # each call runs in eager mode, too
        (OverChosen, "eager"),
        (OverCounts, "eager"),
        *(pytest.param(b, "compiled", marks=pytest.mark.slow) for b in (OverChosen, OverCounts)),
    ],
)
def test_experts_in_a_loop(block: type[nn.Module], start: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Model(block()).eval().requires_grad_(False)
    randomise(base)
    plans = {
        "all": (["gate", "gate_proj", "up_proj", "down_proj"], False),
        "dora": (["up_proj", "down_proj"], True),
        "two": (["experts.1.gate_proj", "experts.3.down_proj"], False),
    }
    folders = {
        name: oracle.save_adapter(
            base,
            tmp_path / name,
            rank=2 + seed,
            targets=[p for p in oracle.linears(base) if p.endswith(tuple(targets))],
            seed=seed,
            use_dora=dora,
        )
        for seed, (name, (targets, dora)) in enumerate(plans.items())
    }
    case = Case(base, folders)
    cm = case.compile({"start": start})
    # Two tokens of the last batch choose four of five experts at most: one gets no rows.
    for names, length in ((["all", None, "dora", "two"], 9), (["dora"], 5), (["all", None], 1)):
        inputs = {"input_ids": torch.randint(0, 50, (len(names), length))}
        check_mixed(cm, case, names, inputs)
