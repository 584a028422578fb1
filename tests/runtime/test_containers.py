"""Tensors in lists, tuples, dicts and dataclasses among a call's arguments."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from dense_merge import TOLERANCE, Case, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import BatchError, LorafxWarning, ProvenanceError

pytestmark = pytest.mark.quick

MIX = ["a", None, "b"]


@dataclasses.dataclass
class Fields:
    x: Tensor
    y: Any


class Names(NamedTuple):
    x: Tensor
    y: Any


class Pair(nn.Module):
    """The first two tensors of any container, with D features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        items = vars(batch) if isinstance(batch, Fields) else batch
        x, y = items.values() if isinstance(items, dict) else items
        return {"logits": self.down(self.up(x) + self.up(y["y"] if isinstance(y, dict) else y))}


def serving(case: Case, **row_dims: Any) -> Any:
    config = lorafx.LoraConfig(row_dims=row_dims)
    options = {"lowering": "reference"}
    return lorafx.compile(case.model(), config, adapters=case.folders, options=options)


def merged(case: Case, batch: Any, dim: int = 0) -> Tensor:
    """Each request's part of its merged model's result."""
    found = (case.alone(name)(batch)["logits"].select(dim, b) for b, name in enumerate(MIX))
    return torch.stack(list(found), dim)


@pytest.mark.parametrize(
    "container",
    [lambda x, y: [x, y], lambda x, y: (x, {"y": y}), lambda x, y: {"x": x, "y": y}, Fields, Names],
)
def test_items_are_requests_as_arguments_are(small, container):
    case = small(Pair, ["up"], ["up", "down"])
    batch = container(torch.randn(3, 2, 6), torch.randn(3, 2, 6))
    got = serving(case)(batch, adapter_names=MIX)["logits"]
    assert error(got, merged(case, batch)) <= TOLERANCE


def test_row_dims_names_a_container_or_its_items(small):
    case = small(Pair, ["up"], ["up", "down"])
    batch = [torch.randn(2, 3, 6), torch.randn(2, 3, 6)]
    for declared in ({"batch": 1}, {"batch.0": 1, "batch.1": 1}):
        got = serving(case, **declared)(batch, adapter_names=MIX)["logits"]
        assert error(got, merged(case, batch, 1)) <= TOLERANCE
    with pytest.raises(BatchError, match=r"the batch has 2 rows.*batch.0 \(2, 3, 6\)"):
        serving(case)(batch, adapter_names=MIX)


class Images(nn.Module):
    """As Z-Image: a tensor (T_i, 6) of each request, all joined, and padded to one length."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, images: list[Tensor], noise: Tensor) -> list[Tensor]:
        lengths = [len(image) for image in images]
        parts = self.up(torch.cat(list(images))).split(lengths)
        padded = self.down(nn.utils.rnn.pad_sequence(parts, batch_first=True) + noise[:, None])
        return [row[:length] for row, length in zip(padded, lengths, strict=True)]


def test_a_list_with_an_item_for_each_request(small):
    case, noise = small(Images, ["up"], ["up", "down"]), torch.randn(3, 9)
    cm = serving(case, images="items")
    for lengths in ((2, 5, 1), (4, 4, 4)):
        images = [torch.randn(length, 6) for length in lengths]
        got = cm(images, noise, adapter_names=MIX)
        for b, name in enumerate(MIX):
            assert error(got[b], case.alone(name)(images, noise)[b]) <= TOLERANCE
    with pytest.raises(BatchError, match=r"adapter_names has 3 entries, but the batch has 2 rows"):
        cm(images[:2], noise, adapter_names=MIX)
    with pytest.raises(ProvenanceError, match="it is not known which requests the input"):
        cm([images[0], images[1], images[0]], noise, adapter_names=MIX)


def test_a_list_that_may_have_an_item_for_each_request_warns_once(small):
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, batch: list[Tensor]) -> dict[str, Tensor]:
            return {"logits": self.up(batch[0])}

    case, batch = small(First, ["up"]), [torch.randn(3, 6) for _ in range(3)]
    cm = serving(case)
    with pytest.warns(LorafxWarning, match=r"'batch' has 3 items.*row_dims=\{'batch': 'items'\}"):
        cm(batch, adapter_names=MIX)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        cm(batch, adapter_names=MIX)
        serving(case, batch=0)(batch, adapter_names=MIX)
        cm([*batch, batch[0] + 1], adapter_names=MIX)


class Means(Images):
    def forward(self, images: list[Tensor], noise: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.stack([row.mean(0) for row in super().forward(images, noise)])}


def test_waves_take_items_apart(small):
    case, noise = small(Means, ["up"], ["up", "down"]), torch.randn(4, 9)
    config = lorafx.LoraConfig(row_dims={"images": "items"}, max_adapters=1)
    options = {"lowering": "reference", "overflow": "waves"}
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options=options)
    images, mix = [torch.randn(2 + b, 6) for b in range(4)], ["a", "b", "b", "a"]
    got = cm(images, noise, adapter_names=mix)["logits"]
    want = [case.alone(name)(images, noise)["logits"][b] for b, name in enumerate(mix)]
    assert error(got, torch.stack(want)) <= TOLERANCE
