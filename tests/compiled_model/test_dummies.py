"""Adapters that stand in for none: what `warmup` calls a model with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.compiled_model.warmup import dummy, dummy_rank
from lorafx.errors import CapacityError, ConfigError
from lorafx.layers import FusedMoE
from lorafx.runtime.marking import build_sites

pytestmark = pytest.mark.any_sizes


class Cut(nn.Linear):
    """A linear whose factors' rank is cut over `shards` processes."""

    shards = 1


@pytest.fixture
def cut() -> Iterator[type[Cut]]:
    lorafx.register(Cut, rank_shards=lambda module: module.shards)
    yield Cut
    lorafx.unregister(Cut)


class TwoCuts(nn.Module):
    def __init__(self, *shards: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cut(6, 6) for _ in shards)
        for layer, count in zip(self.layers, shards, strict=True):
            layer.shards = count

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _sites(model: nn.Module) -> tuple[lorafx.Site, ...]:
    return build_sites(model, lorafx.LoraConfig())[1]


class Routed(nn.Module):
    """A router, its experts, and a linear whose rank is cut over three."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = CutExperts(4, 2, 6, 8)
        self.out = Cut(6, 6)
        self.out.shards = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x, self.gate(x)))


class CutExperts(FusedMoE):
    """Routed experts whose factors' rank is cut over two."""


def test_experts_are_warmed_up_too(cut: type[Cut]) -> None:
    """Dummies have factors for every expert, of a rank that all shards divide."""
    targets = lorafx.LoraConfig(target_modules=["gate", "experts", "out"], max_rank=12)
    lorafx.register(CutExperts, kind="experts", weight="w13_weight", rank_shards=lambda _: 2)
    try:
        sites = build_sites(Routed(), targets)[1]
        assert dummy_rank(sites, 12) == 12  # 8, up to a multiple of 6
        model = Routed().eval()
        cm = lorafx.compile(model, targets, options={"lowering": "reference"})
        cm.warmup({"x": torch.randn(2, 3, 6)}, batch_sizes=(2,))
    finally:
        lorafx.unregister(CutExperts)
    graphs = cm.recompiles
    cm(torch.randn(2, 3, 6), adapter_names=[None, None])
    assert graphs == cm.recompiles > 0


def test_a_rank_that_the_banks_have_no_room_for(cut: type[Cut]) -> None:
    """Named: the default rank, the multiple, max_rank, and what to compile with."""
    wanted = (
        r"default rank 8, rounded up to a multiple of 12 because LoRA ranks are sharded "
        r"\(layers.0 4, layers.1 6\), need rank 12, over max_rank = 10; .*max_rank=12"
    )
    with pytest.raises(CapacityError, match=wanted):
        dummy_rank(_sites(TwoCuts(4, 6)), 10)
    cm = lorafx.compile(
        TwoCuts(4, 6).eval(), lorafx.LoraConfig(max_rank=8), options={"lowering": "reference"}
    )
    with pytest.raises(CapacityError, match="multiple of 12"):
        cm.warmup({"x": torch.randn(2, 6)})
    assert cm.recompiles == 0
    with pytest.raises(ConfigError, match=r"layers.0: rank_shards of Cut .* got 0"):
        dummy_rank(_sites(TwoCuts(0)), 16)


class Packed(nn.Linear):
    """Four slices in one weight, two names in the mapping."""

    sizes = (5, 6, 7, 8)


class PackedModel(nn.Module):
    packed_modules_mapping: ClassVar = {"fused": ["first", "second"]}

    def __init__(self) -> None:
        super().__init__()
        self.fused = Packed(9, 26)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x)


def test_dummies_are_one_a_slice_whatever_the_mapping_counts() -> None:
    lorafx.register(Packed, output_sizes="sizes")
    try:
        (site,) = _sites(PackedModel())
        made = dummy("d", [site], 3, seed=0)
        assert [tuple(w.B.shape) for w in made.weights.values()] == [(5, 3), (6, 3), (7, 3), (8, 3)]
        assert {tuple(w.A.shape) for w in made.weights.values()} == {(3, 9)}
        cm = lorafx.compile(
            PackedModel().eval(), lorafx.LoraConfig(), options={"lowering": "reference"}
        )
        x = torch.randn(2, 9)
        cm.warmup({"x": x}, batch_sizes=(2,))
        with torch.no_grad():
            assert torch.equal(cm(x), cm._orig_mod(x))
        assert cm.recompiles == 2
    finally:
        lorafx.unregister(Packed)
