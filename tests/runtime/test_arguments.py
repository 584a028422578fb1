"""Arguments in dicts, names in `row_dims` that are no arguments', what messages say of calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attached import fresh_dynamo  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, Case, error
from torch import Tensor, nn
from transformers import BatchEncoding

import lorafx
from lorafx.errors import BatchError, ConfigError, ProvenanceError

pytestmark = pytest.mark.quick

MIX = ["a", None, "b"]


class Batched(nn.Module):
    """Takes a batch as dicts do: its tensors by name, and others beside."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)

    def forward(self, batch: dict[str, Any], scale: Tensor | None = None) -> dict[str, Tensor]:
        x = batch["x"] if "inner" not in batch else batch["inner"]["x"]
        y = self.up(x) * batch["weight"][..., None]
        return {"logits": y if scale is None else y * scale}


@pytest.fixture
def case(small) -> Case:
    return small(Batched, ["up"])


def batch_of(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(rows, 4, 6), "weight": torch.rand(rows, 4)}


def want(case: Case, batch: dict[str, Tensor], names: list[str | None] = MIX) -> Tensor:
    rows = [{key: t[i : i + 1] for key, t in batch.items()} for i in range(len(names))]
    return torch.cat([case.alone(n)(row)["logits"] for n, row in zip(names, rows, strict=True)])


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_batch_in_a_dict(case: Case, kind: type) -> None:
    cm, batch = case.compile(), batch_of(3)
    got = cm(kind(batch), adapter_names=MIX)["logits"]
    assert error(got, want(case, batch)) <= 1e-5
    assert error(got, want(case, batch, [None] * 3)) > 1e-3
    graphs = cm.recompiles
    other = ["b", None, "a"]
    got = cm(batch=kind(batch), adapter_names=other)["logits"]
    assert error(got, want(case, batch, other)) <= 1e-5
    assert cm.recompiles == graphs
    two = batch_of(2)
    assert error(cm(kind(two), adapter_names=MIX[:2])["logits"], want(case, two, MIX[:2])) <= 1e-5


def test_dicts_in_dicts_and_requests_in_another_dimension(case: Case) -> None:
    batch = batch_of(3)
    turned = {"inner": {"x": batch["x"].transpose(0, 1)}, "weight": batch["weight"].T}
    dims = {"batch.inner.x": 1, "batch.weight": 1}
    config = lorafx.LoraConfig(row_dims=dims)
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE)
    got = cm(turned, adapter_names=MIX)["logits"]
    assert error(got.transpose(0, 1), want(case, batch)) <= 1e-5
    with pytest.raises(BatchError, match=r"adapter_names has 2 entries, but the batch has 3 rows"):
        cm(turned, adapter_names=MIX[:2])


def test_what_does_not_fit_lists_the_arguments_and_row_dims(case: Case) -> None:
    cm, batch = case.compile(), batch_of(3)
    seen = (
        r"row_dims=\{argument: dim\}\).*; the call has batch.x \(3, 4, 6\), batch.weight \(3, 4\)$"
    )
    with pytest.raises(BatchError, match=f"has 2 entries, but the batch has 3 rows.*{seen}"):
        cm(batch, adapter_names=["a", None])
    short = {**batch, "weight": batch["weight"][:2]}
    match = r"'batch.weight' has shape \(2, 4\).*row_dims=\{'batch.weight': dim\}.*batch.x \(3, 4"
    with pytest.raises(BatchError, match=match):
        cm(short, adapter_names=MIX)
    with pytest.raises((BatchError, ProvenanceError), match="no argument of this call carries"):
        lorafx.compile(
            case.model(),
            lorafx.LoraConfig(row_dims={"batch": None}),
            adapters=case.folders,
            options=REFERENCE,
        )(batch, adapter_names=MIX)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("skale", r"'skale', which no method of Batched takes; nearest: scale; its forward takes"),
        ("btch.x", r"'btch.x', .*nearest: batch"),
    ],
)
def test_names_that_are_no_arguments(case: Case, name: str, match: str) -> None:
    config, model = lorafx.LoraConfig(row_dims={name: 0}), case.model()
    for make in (lorafx.compile, lorafx.attach):
        with pytest.raises(ConfigError, match=match):
            make(model, config, adapters=case.folders)
    assert not any(module._forward_hooks for module in model.modules())


def test_models_that_take_any_keyword(llama: Case) -> None:
    """Those of transformers do, for their attention: only a slip of a known name is refused."""
    config = lorafx.LoraConfig(row_dims={"input_idss": 0})
    with pytest.raises(ConfigError, match=r"'input_idss'.*nearest: input_ids"):
        lorafx.compile(llama.model(), config, adapters=llama.folders)
    for name in ("pixel_values", "something_of_its_own"):
        config = lorafx.LoraConfig(row_dims={name: None})
        lorafx.compile(llama.model(), config, adapters=llama.folders, options=REFERENCE)
