"""Classes that replace a registered one without inheriting from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from dense_merge import check_mixed
from hand_made import factors, hand_case, merged, save
from tiny import randomise
from torch import Tensor, nn

import lorafx
from lorafx import layers
from lorafx.errors import ConfigError

K, SIZES = 6, (8, 4, 4)
NAMES = ["a", None, "b", "a"]


class MyQKV(nn.Module):
    """A packed projection of its own: no registered class above it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = K, SIZES
        self.weight = nn.Parameter(torch.randn(sum(SIZES), K) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Model(nn.Module):
    """A packed projection, and a linear that takes it apart again."""

    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = MyQKV()
        self.o_proj = nn.Linear(sum(SIZES), K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = torch.tanh(self.qkv_proj(x)).split(SIZES, dim=-1)
        return {"logits": x + self.o_proj(torch.cat((q, k * 2, v - 1), dim=-1))}


def test_packed_layers_are_matched_as_what_they_replace(tmp_path: Path) -> None:
    """An adapter of the whole packed layer, and one of two of its slices by their own names."""
    names: Any = {"input_size": "inputs", "output_sizes": "outputs"}
    lorafx.register_oot(layers.QKVParallelLinear, MyQKV, **names)
    torch.manual_seed(0)
    base = Model().eval()
    randomise(base)
    case = hand_case(base, tmp_path, a=["qkv_proj", "o_proj"])
    a, b = factors(base, ["qkv_proj"], rank=3, seed=7)["qkv_proj"]
    rows = {"q_proj": slice(0, 8), "v_proj": slice(12, 16)}
    case.folders["b"] = _save_slices(tmp_path / "b", {n: (a, b[s]) for n, s in rows.items()})
    kept = torch.zeros_like(b)
    for part in rows.values():
        kept[part] = b[part]
    case.merged["b"] = merged(base, {"qkv_proj": (a, kept)})
    try:
        cm = case.compile()
        check_mixed(cm, case, NAMES, {"x": torch.randn(4, 3, K)})
        (site,) = [site for site in cm.explain().sites if site.path == "qkv_proj"]
        assert (site.registered, site.in_features, site.out_features) == ("MyQKV", 6, 16)
    finally:
        lorafx.unregister(MyQKV)


def _save_slices(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """An adapter of projections that the base has packed only."""
    apart = nn.ModuleDict({name: nn.Linear(K, len(b)) for name, (_, b) in pairs.items()})
    return save(apart, folder, pairs)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"takes two nn\.Module classes, got <class 'int'>"):
        lorafx.register_oot(layers.QKVParallelLinear, int)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"takes two nn\.Module classes"):
        lorafx.register_oot(nn.Linear(2, 2), MyQKV)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no class along the MRO of LayerNorm is registered"):
        lorafx.register_oot(nn.LayerNorm, MyQKV)
    with pytest.raises(ConfigError, match="Linear is already registered"):
        lorafx.register_oot(layers.QKVParallelLinear, nn.Linear)
