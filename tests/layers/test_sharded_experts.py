"""Routed experts cut among several ranks, and adapters of them, against one rank."""

import oracle
import pytest
import sharded_experts
import torch
from torch import nn
from two_ranks import on_ranks

import lorafx
from lorafx.layers import FusedMoE
from lorafx.layers.registered import DownSharding, GateUpSharding

BATCHES = [
    ["all", None, "each", "stacked", "down", "up", None],
    [None, "stacked", "each"],
    [None, None],
]


@pytest.mark.parametrize(
    "lowering", ["reference", pytest.param("inductor", marks=pytest.mark.slow)]
)
@torch.no_grad()
@pytest.mark.slow
def test_mixed_batches_of_experts_on_two_ranks(lowering, tmp_path):
    model = sharded_experts.base()
    folders, merged = sharded_experts.adapters(model, tmp_path)
    models = {None: model, **merged}
    batches = [(torch.randn(len(names), 4, sharded_experts.H), names) for names in BATCHES]
    work = (model.state_dict(), folders, batches, {"lowering": lowering}, lowering == "reference")
    for rank, found in enumerate(on_ranks(2, sharded_experts.run, *work)):
        for (x, names), y in zip(batches, found["mixed"], strict=True):
            want = [models[name](x[i : i + 1]) for i, name in enumerate(names)]
            oracle.assert_close(y, [torch.cat(want)], label=f"rank {rank}, {names}")
        x, names = batches[0]
        for i, name in enumerate(names):
            changed = oracle.difference([models[name](x[i : i + 1])], [model(x[i : i + 1])])
            assert (changed > 1e-2) == (name is not None)
        for name, y in found["merged"].items():
            oracle.assert_close(y, [models[name](x)], label=f"rank {rank}, {name} merged")
        assert found["sizes"] == {
            "experts.w13_weight": (6, [4, 4]),  # of 8 gates and 8 ups
            "experts.w2_weight": (4, [6]),
            "gate": (6, [5]),
        }
        assert lowering == "inductor" or found["captured"] == 0
        assert "only a share of its weight; export on a single rank" in found["export"]


class Unregistered(nn.Module):
    """Experts of a class that nobody registered, on one of two ranks."""

    tp_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 4, 6))
        self.down = nn.Parameter(torch.zeros(3, 6, 4))


def test_a_class_that_does_not_say_how_it_is_cut():
    model = nn.ModuleDict({"experts": Unregistered()}).eval()
    with pytest.raises(lorafx.TargetError, match=r"experts.up \(Unregistered\): 2 ranks share .*"):
        lorafx.compile(model, lorafx.LoraConfig(target_modules=["experts"]))
    sharding = {"up": GateUpSharding(), "down": DownSharding()}
    with pytest.raises(
        lorafx.ConfigError, match="a mapping from parameter names for routed experts"
    ):
        lorafx.register(Unregistered, kind="experts", sharding=sharding["up"])
    with pytest.raises(lorafx.ConfigError, match="a single object for other kinds"):
        lorafx.register(Unregistered, sharding=sharding)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_add_up(ranks):
    """Σ over the ranks of what each adds is ΔW of all."""
    layer = FusedMoE(3, 1, 6, 8)
    a, b = torch.randn(3, 2, 6), torch.randn(3, 8, 2)
    down_a, down_b = torch.randn(3, 2, 8), torch.randn(3, 6, 2)
    x, inner = torch.randn(3, 5, 6), torch.randn(3, 5, 8)
    rows, total = [], torch.zeros(3, 5, 6)
    for rank in range(ranks):
        layer.tp_rank, layer.intermediate_size_per_partition = rank, 8 // ranks
        own_a, own_b = GateUpSharding().cut(layer, (1,), a, b)
        rows.append(x @ own_a.mT @ own_b.mT)
        own_a, own_b = DownSharding().cut(layer, (0,), down_a, down_b)
        total += layer.own_inner(inner, dim=-1) @ own_a.mT @ own_b.mT
    torch.testing.assert_close(torch.cat(rows, dim=-1), x @ a.mT @ b.mT)
    torch.testing.assert_close(total, inner @ down_a.mT @ down_b.mT)
