"""Layers that pick items of a list by numbers of their own, and write into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case
from dynamo_graphs import both_ways
from hand_made import hand_case
from torch import Tensor, nn

H, LAYERS = 6, 4
NAMES = ["a0", None, "a1"]


class Part:
    """What one layer keeps: the sum of what it was given so far."""

    factor = 2.0

    def __init__(self) -> None:
        self.kept: Any = None
        self.calls = 0

    def update(self, h: Tensor) -> Tensor:
        self.kept = h * self.factor if self.kept is None else self.kept + h
        self.calls += 1
        return self.kept


class Other(Part):
    factor = 3.0


class Compares(Part):
    """Whether there is as much of the two decides what is done."""

    def update(self, h: Tensor) -> Tensor:
        same = self.kept.shape[1] == h.shape[1]
        return h + (self.kept if same else self.kept.mean(1, keepdim=True))


class Cache:
    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def update(self, h: Tensor, place: int) -> Tensor:
        return self.parts[place].update(h)


class Block(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.up = nn.Linear(H, H)
        self.place = place

    def forward(self, h: Tensor, cache: Any) -> Tensor:
        return h + cache.update(self.up(h), self.place)


class Reads(Block):
    """Reads its number for something else too."""

    def forward(self, h: Tensor, cache: Any) -> Tensor:
        h = super().forward(h, cache)
        return h * 2 if self.place % 2 else h


class Counts(Block):
    """Reads how often the first layer has been called."""

    def forward(self, h: Tensor, cache: Any) -> Tensor:
        return super().forward(h, cache) * (1 + cache.parts[0].calls)


class All(Block):
    """Reads the parts of all layers."""

    def forward(self, h: Tensor, cache: Any) -> Tensor:
        return super().forward(h, cache) * (1 + sum(part.calls for part in cache.parts))


class Returns(Block):
    """Hands out what it has stored, and stores what it has been given."""

    def forward(self, h: Tensor, cache: Any) -> Tensor:
        found = cache.update(self.up(h), self.place)
        cache.parts[self.place].given = h
        return found


class Model(nn.Module):
    block: type[Block] = Block

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(place) for place in range(LAYERS))

    def forward(self, x: Tensor, cache: Any = None, last: Any = None) -> dict[str, Any]:
        if cache is None:
            cache = Cache([Part() for _ in self.layers])
        x = x.clone()
        for layer in self.layers:
            x = layer(x, cache)
        return {"logits": x, "kept": [part.kept for part in cache.parts]}


class Replaces(Model):
    """Exchanges a part while its layers are called."""

    def forward(self, x: Tensor, cache: Any = None, last: Any = None) -> dict[str, Any]:
        x = x.clone()
        for place, layer in enumerate(self.layers):
            if place == 2:
                cache.parts[3] = Other()
            x = layer(x, cache)
        return {"logits": x, "kept": [part.kept for part in cache.parts]}


def parts(kind: str) -> list[Part]:
    found = [Part() for _ in range(LAYERS)]
    if kind == "another class":
        found[2] = Other()
    elif kind == "another value":
        found[2].factor = 0.5
    elif kind == "one twice":
        found[3] = found[1]
    elif kind == "filled":
        found[2].kept = torch.ones(3, 4, H)
    return found


@pytest.mark.parametrize(
    ("block", "kind", "count"),
    [
        (Block, "equal", 2),  # the list is known from then on
        (Block, "made in the call", 3),
        (Block, "another class", 1),
        (Block, "another value", 1),
        (Block, "one twice", 1),
        (Block, "filled", 1),
        (Reads, "equal", 0),
        (Counts, "equal", 2),  # the second's stand for the others'
        (All, "equal", 0),
        (Returns, "equal", 2),  # the first stores an input of the graph's clone
        (Block, "exchanged", 0),
    ],
)
def test_layers_that_write_into_items_of_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: type[Block], kind: str, count: int
) -> None:
    torch.manual_seed(0)
    base = (Replaces if kind == "exchanged" else Model)(block).eval().requires_grad_(False)
    paths = [f"layers.{index}.up" for index in range(LAYERS)]
    case: Case = hand_case(base, tmp_path, a0=paths, a1=paths[1:])
    x = torch.randn(3, 4, H)

    def run(options: dict[str, Any]) -> Any:
        cm: Any = case.compile(options, dynamic=False)
        found = []
        for _ in range(2):  # with parts that are empty, and equal ones that are not
            cache = None if kind == "made in the call" else Cache(parts(kind))
            for _ in range(2):
                out = cm(x=x, cache=cache, adapter_names=NAMES)
                found += [out["logits"], *out["kept"]]
                if cache is not None:
                    found.append(torch.tensor([part.calls for part in cache.parts]))
        return found

    found = both_ways(monkeypatch, run)
    assert found.replayed[0] == count


@pytest.mark.parametrize(
    ("lengths", "count", "graphs"), [([5, 5, 5, 5], 2, LAYERS + 1), ([5, 5, 3, 5], 1, LAYERS)]
)
def test_sizes_of_items_that_layers_compare(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    count: int,
    graphs: int,
) -> None:
    """A size that a layer finds to be another one's is that of the other layers as well, and is
    guarded: what has other sizes is another graph."""
    torch.manual_seed(0)
    base = Model(Block).eval().requires_grad_(False)
    paths = [f"layers.{index}.up" for index in range(LAYERS)]
    case: Case = hand_case(base, tmp_path, a0=paths, a1=paths[1:])
    x = torch.randn(3, 5, H)

    def cache(lengths: list[int]) -> Cache:
        found: list[Part] = [Compares() for _ in lengths]
        for part, length in zip(found, lengths, strict=True):
            part.kept = torch.ones(3, length, H)
        return Cache(found)

    def run(options: dict[str, Any]) -> Any:
        cm: Any = case.compile(options, dynamic=True)
        kinds = [lengths, *([*[5] * place, 2, *[5] * (3 - place)] for place in range(LAYERS))]
        return [cm(x=x, cache=cache(kind), adapter_names=NAMES)["logits"] for kind in kinds]

    found = both_ways(monkeypatch, run)
    assert found.replayed[0] == count
    assert len(found.graphs) == graphs
