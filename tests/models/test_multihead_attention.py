"""LoRA on nn.MultiheadAttention as PEFT wraps it, in mixed batches, against PEFT's own output."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from attached import EAGER
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError, UnsupportedAdapterError


class Reader(nn.Module):
    """x (B, T, 8): an encoder layer, then attention from x to itself turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        other = h.flip(1)
        return self.out(self.cross(h, other, other)[0])


@pytest.fixture(autouse=True, scope="module")
def slowly() -> Iterator[None]:
    """torch's fused encoder layer takes the weights without calling PEFT's wrapper, which would
    have PEFT compute the base."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


PLANS = {
    "own": (["layer.self_attn"], 2),
    "cross": (["cross"], 3),
    "all": (["layer.self_attn", "cross", "layer.linear1", "out"], 4),
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("attention")
    return {
        name: oracle.save_adapter(base, folder / name, rank=rank, targets=targets, seed=rank)
        for name, (targets, rank) in PLANS.items()
    }


@pytest.fixture(scope="module")
def cm(base: nn.Module, folders: dict[str, Path]) -> Any:
    return lorafx.compile(copy.deepcopy(base), folders, options=REFERENCE)


def expected(
    base: nn.Module, folders: dict[str, Path], names: list[str | None], x: Tensor
) -> Tensor:
    models = [oracle.by_peft(base, folders[name] if name else None) for name in names]
    with torch.no_grad():
        return torch.cat([model(row[None]) for model, row in zip(models, x, strict=True)])


def test_rows_of_one_batch(cm: Any, base: nn.Module, folders: dict[str, Path]) -> None:
    names: list[str | None] = ["own", None, "cross", "all", "own"]
    x = torch.randn(5, 6, 8)
    want = expected(base, folders, names, x)
    oracle.assert_close(cm(x, adapter_names=names), [want])
    unchanged = expected(base, folders, [None] * 5, x)
    for row, name in enumerate(names):
        changed = oracle.difference([want[row]], [unchanged[row]])
        assert (changed > 1e-3) == (name is not None)
    compiled = cm.recompiles
    x = torch.randn(5, 6, 8)
    want = expected(base, folders, names[::-1], x)
    oracle.assert_close(cm(x, adapter_names=names[::-1]), [want])
    assert cm.recompiles == compiled
    oracle.assert_close(cm(x[:1], adapter_names=["own"]), [want[:1]])


def test_merging(cm: Any, base: nn.Module, folders: dict[str, Path]) -> None:
    x = torch.randn(2, 6, 8)
    cm.merge("all")
    try:
        found = cm(x, adapter_names=["all", "all"])
        oracle.assert_close(found, [expected(base, folders, ["all", "all"], x)])
    finally:
        cm.unmerge()


def test_other_ways_in(base: nn.Module, folders: dict[str, Path]) -> None:
    """A name of the attention means its output projection too, and a PeftModel is taken over."""
    x = torch.randn(2, 6, 8)
    want = expected(base, folders, ["cross", None], x)
    config = peft.LoraConfig(target_modules=["cross"], r=4)
    cm = lorafx.compile(copy.deepcopy(base), config, options=REFERENCE, dynamic=False)
    assert [site.path for site in cm.sites] == ["cross", "cross.out_proj"]
    cm.load_adapter(folders["cross"], "cross")
    oracle.assert_close(cm(x, adapter_names=["cross", None]), [want])
    model = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), str(folders["cross"]), adapter_name="cross"
    )
    cm = lorafx.compile(model.eval(), options=REFERENCE, dynamic=False)
    oracle.assert_close(cm(x, adapter_names=["cross", None]), [want])


def test_in_eager_mode(base: nn.Module, folders: dict[str, Path]) -> None:
    model = copy.deepcopy(base)
    lorafx.attach(model, folders)
    x = torch.randn(2, 6, 8)
    with pytest.raises(MatchError, match="at layer"), lorafx.adapters(model, "own"), EAGER():
        model(x)


def test_a_bias_is_refused(base: nn.Module, tmp_path: Path) -> None:
    """PEFT trains it, and leaves it out of what the attention computes."""
    folder = oracle.save_adapter(base, tmp_path, rank=2, targets=["cross"], lora_bias=True)
    with pytest.raises(UnsupportedAdapterError, match="PEFT leaves it out there"):
        lorafx.compile(copy.deepcopy(base), {"a": folder}, options=REFERENCE)
