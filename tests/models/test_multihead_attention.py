"""LoRA on nn.MultiheadAttention as PEFT wraps it, in mixed batches, against PEFT's own output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from attached import EAGER
from dense_merge import REFERENCE, Case, PeftCase, check_mixed
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError, UnsupportedAdapterError

pytestmark = pytest.mark.any_sizes


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
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    base, folder = Reader().eval().requires_grad_(False), tmp_path_factory.mktemp("attention")
    folders = {
        name: oracle.save_adapter(base, folder / name, rank=rank, targets=targets, seed=rank)
        for name, (targets, rank) in PLANS.items()
    }
    return PeftCase(base, folders)


@pytest.fixture(scope="module")
def cm(case: Case) -> Any:
    return case.compile()


def inputs(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 6, 8)}


def test_rows_of_one_batch(cm: Any, case: Case) -> None:
    names: list[str | None] = ["own", None, "cross", "all", "own"]
    check_mixed(cm, case, names, inputs(5))
    compiled = cm.recompiles
    check_mixed(cm, case, names[::-1], inputs(5))
    assert cm.recompiles == compiled
    check_mixed(cm, case, ["own"], inputs(1))


def test_merging(cm: Any, case: Case) -> None:
    cm.merge("all")
    try:
        check_mixed(cm, case, ["all", "all"], inputs(2))
    finally:
        cm.unmerge()


@pytest.mark.slow
def test_other_ways_in(case: Case) -> None:
    """A name of the attention means its output projection too, and a PeftModel is taken over."""
    config = peft.LoraConfig(target_modules=["cross"], r=4)
    cm: Any = lorafx.compile(case.model(), config, options=REFERENCE, dynamic=False)
    assert [site.path for site in cm.sites] == ["cross", "cross.out_proj"]
    cm.load_adapter(case.folders["cross"], "cross")
    check_mixed(cm, case, ["cross", None], inputs(2))
    model = peft.PeftModel.from_pretrained(
        case.model(), str(case.folders["cross"]), adapter_name="cross"
    )
    cm = lorafx.compile(model.eval(), options=REFERENCE, dynamic=False)
    check_mixed(cm, case, ["cross", None], inputs(2))


def test_in_eager_mode(case: Case) -> None:
    model = lorafx.attach(case.model(), case.folders)
    with pytest.raises(MatchError, match="at layer"), lorafx.adapters(model, "own"), EAGER():
        model(**inputs(2))


def test_a_bias_is_refused(case: Case, tmp_path: Path) -> None:
    """PEFT trains it, and leaves it out of what the attention computes."""
    folder = oracle.save_adapter(case.base, tmp_path, rank=2, targets=["cross"], lora_bias=True)
    with pytest.raises(UnsupportedAdapterError, match="PEFT leaves it out there"):
        lorafx.compile(case.model(), {"a": folder}, options=REFERENCE)
