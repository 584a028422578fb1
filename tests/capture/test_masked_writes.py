"""Features of images that are written, in order, to the positions of a mask, in mixed batches."""

from __future__ import annotations

import pytest
import torch
from dense_merge import REFERENCE, error
from slowly import few
from torch import Tensor, nn

import lorafx
from lorafx.errors import BatchError, ProvenanceError

K, PER = 6, 2
MIXED = ["a", None, "b"]
INDUCTOR = {"lowering": "inductor"}


class Reader(nn.Module):
    """Tokens x (B, L, K), of which those in `mask` (B, L) become images (N, PER, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Linear(K, K)
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor, mask: Tensor, images: Tensor) -> dict[str, Tensor]:
        h = self.put(x, mask, torch.tanh(self.eye(images)))
        return {"logits": self.w(h + h.mean(1, keepdim=True))}


class Scattered(Reader):
    def put(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        return x.masked_scatter(mask[..., None], features)


class Indexed(Reader):
    def put(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        x = x.clone()
        x[mask] = features.view(-1, K)
        return x


class Added(Reader):
    """Between graphs, into memory that a graph made; later tokens come first."""

    def put(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        x, rows = torch.relu(x), features.flatten(0, 1)
        torch._dynamo.graph_break()
        x[mask] += rows
        torch._dynamo.graph_break()
        return x.flip(1)


class Pieces(Reader):
    """A graph takes a tensor of each request, and its layers serve them one by one."""

    def put(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        pieces = list(features)
        torch._dynamo.graph_break()
        turned = [self.eye(piece) for piece in pieces]
        torch._dynamo.graph_break()
        features = torch.cat(turned)
        torch._dynamo.graph_break()
        return x.masked_scatter(mask[..., None], features)


def batch(rows: int, length: int = 5, counts: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """PER positions for each row, or `counts`, at random places."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, count in zip(mask, counts or (PER,) * rows, strict=True):
        row[torch.randperm(length)[:count]] = True
    images = torch.randn(rows, PER, K)
    return {"x": torch.randn(rows, length, K), "mask": mask, "images": images}


@pytest.mark.parametrize("cls", few([Scattered, Indexed, Added, Pieces], Added, Indexed))
def test_each_row_gets_its_own_features(small, cls):
    torch.manual_seed(0)
    case = small(cls, ["eye", "w"])
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
    for names, length in ((["a"] * 3, 5), (MIXED, 5), (["b", "b", None, "a"], 6)):
        inputs = batch(len(names), length)
        found = cm(**inputs, adapter_names=names)["logits"]
        assert error(found, case.expected(names, inputs)) <= 1e-5, names


@pytest.mark.parametrize("options", [REFERENCE, pytest.param(INDUCTOR, marks=pytest.mark.slow)])
def test_positions_that_do_not_fit_the_requests_are_refused(small, options):
    torch.manual_seed(0)
    case = small(Scattered, ["eye", "w"])
    cm = case.compile(options)
    fits, odd = batch(3), batch(3, counts=(2 * PER, 0, PER))
    cm(**fits, adapter_names=MIXED)
    with pytest.raises(BatchError, match=r"request 0 has 4 positions .* is 2, so"):
        cm(**odd, adapter_names=MIXED)
    with torch.no_grad():
        expected = case.alone("a")(**odd)["logits"]
    assert error(cm(**odd, adapter_names=["a"] * 3)["logits"], expected) <= 1e-5
    found = cm(**fits, adapter_names=MIXED)["logits"]
    assert error(found, case.expected(MIXED, fits)) <= 1e-5


def test_images_that_no_adapter_touches_go_anywhere(small):
    """The requests share them, in any number; the text has adapters alone."""
    torch.manual_seed(0)
    case = small(Scattered, ["w"])
    config = lorafx.LoraConfig(row_dims={"images": None})
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE)
    for rows in (["b", None], MIXED):
        inputs = batch(len(rows), counts=(2 * PER, 0, 2 * PER)[: len(rows)])
        inputs["images"] = torch.randn(int(inputs["mask"].sum()) // PER, PER, K)
        found = cm(**inputs, adapter_names=rows)["logits"]
        with torch.no_grad():
            wholes = [case.alone(name)(**inputs)["logits"] for name in rows]
        expected = torch.stack([whole[i] for i, whole in enumerate(wholes)])
        assert error(found, expected) <= 1e-5
    case = small(Scattered, ["eye", "w"])
    fixed = {"options": REFERENCE, "dynamic": False}
    cm = lorafx.compile(case.model(), config, adapters=case.folders, **fixed)
    with pytest.raises(ProvenanceError, match=r"at eye .* shared by all requests"):
        cm(**batch(3), adapter_names=MIXED)
