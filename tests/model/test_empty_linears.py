"""Linears without inputs or outputs: nothing that LoRA could change, and nothing to fail."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx


class NoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(4, 6)
        self.extra = nn.Linear(0, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.extra(x[..., :0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("targets", ["all-linear", ["main", "extra"]])
def test_no_inputs(tmp_path: Path, targets: str | list[str]) -> None:
    model = NoInputs().eval().requires_grad_(False)
    folder = oracle.save_adapter(model, tmp_path, rank=2, targets=["main", "extra"])
    cases = oracle.Oracle.of(model, {"a": folder})
    config = lorafx.LoraConfig(target_modules=targets)
    with pytest.warns(lorafx.LorafxWarning, match=r"extra \(Linear\) is left out") as warned:
        cm = lorafx.compile(model, config, adapters={"a": folder}, options=REFERENCE)
    assert len([w for w in warned if issubclass(w.category, lorafx.LorafxWarning)]) == 1
    assert [site.path for site in cm.sites] == ["main"]
    x = torch.randn(2, 4)
    oracle.assert_close(cm(x, adapter_names=["a", None]), cases.rows(["a", None], {"x": x}))
    with pytest.raises(lorafx.TargetError, match=r"names no module .* that can carry LoRA"):
        lorafx.compile(NoInputs().eval(), lorafx.LoraConfig(target_modules=["extra"]))
