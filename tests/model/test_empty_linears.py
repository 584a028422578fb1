"""Linears without inputs or outputs: nothing that LoRA could change, and nothing to fail."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
import transformers
from tiny import randomise
from torch import Tensor, nn

import lorafx

REFERENCE = {"lowering": "reference"}


def test_mobilebert_of_equal_sizes(tmp_path: Path) -> None:
    """Its head has a linear for what the hidden size has beyond the embedding's."""
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 24, "vocab_size": 61}
    inner = {"intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 1}
    config = transformers.MobileBertConfig(
        **sizes, **inner, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.MobileBertForMaskedLM(config).eval().requires_grad_(False)
    randomise(model)
    linears = oracle.linears(model)
    assert tuple(model.cls.predictions.dense.weight.shape) == (0, 61)
    folders = {
        "all": oracle.save_adapter(model, tmp_path / "all", rank=2, targets=linears),
        "some": oracle.save_adapter(model, tmp_path / "some", rank=3, targets=linears[::2], seed=1),
    }
    cases = oracle.Oracle.of(model, folders)
    with pytest.warns(lorafx.LorafxWarning, match=r"predictions\.dense \(Linear\) is left out"):
        cm = lorafx.compile(model, folders, options=REFERENCE, dynamic=False)
    inputs, names = {"input_ids": torch.randint(0, 61, (3, 5))}, ["all", None, "some"]
    want = cases.rows(names, inputs)
    oracle.assert_close(cm(**inputs, adapter_names=names), want)
    assert oracle.difference(cases.rows([None] * 3, inputs), want) > 1e-2


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
        cm = lorafx.compile(model, config, adapters={"a": folder}, options=REFERENCE, dynamic=False)
    assert len([w for w in warned if issubclass(w.category, lorafx.LorafxWarning)]) == 1
    assert [site.path for site in cm.sites] == ["main"]
    x = torch.randn(2, 4)
    oracle.assert_close(cm(x, adapter_names=["a", None]), cases.rows(["a", None], {"x": x}))
    with pytest.raises(lorafx.TargetError, match=r"names no module .* that can carry LoRA"):
        lorafx.compile(NoInputs().eval(), lorafx.LoraConfig(target_modules=["extra"]))
