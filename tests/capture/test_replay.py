"""Replayed layers: Dynamo's graph and its guards are what they are if every layer is traced."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dense_merge import Case, check_mixed
from dynamo_graphs import both_ways
from hand_made import hand_case
from layer_changes import activation, dtype, eps, hook, no_bias, own_forward, tied
from torch import Tensor, nn

from lorafx.capture import replay_graph

H, LAYERS = 6, 4
NAMES = ["a0", None, "a1"]


class Block(nn.Module):
    """h + down(act(up(norm(h)))) · scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, 2 * H)
        self.down = nn.Linear(2 * H, H, bias=False)
        self.act: Any = torch.tanh
        self.gate: nn.Module = nn.Tanh()
        self.scale = 0.5
        self.sizes = {"width": 2 * H}

    def forward(self, h: Tensor) -> Tensor:
        y = self.act(self.up(self.norm(h.to(self.norm.weight.dtype)).to(h.dtype)))
        y = self.down(y.reshape(*h.shape[:-1], self.sizes["width"])).mul(self.scale)
        return h + self.gate(y) if self.training else h + self.gate(y) * 0.5


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(count))
        for place, layer in enumerate(self.layers):
            layer.place = place  # what nobody reads may differ

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.clone()  # what is no input of the graph
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


def case_of(base: nn.Module, folder: Path) -> Case:
    base.requires_grad_(False)
    layers: Any = base.layers
    paths = [f"layers.{index}.{name}" for index in range(len(layers)) for name in ("up", "down")]
    return hand_case(base, folder, a0=paths, a1=paths[1:])


def stack_run(
    case: Case, change: Callable[[Any], Any] | None = None, at: int = 0
) -> Callable[[dict[str, Any]], list[Tensor]]:
    """Calls of a mixed batch before and, where there is one, after a change of one layer."""
    torch.manual_seed(1)
    inputs = {"x": torch.randn(3, 4, H)}

    def run(options: dict[str, Any]) -> list[Tensor]:
        cm: Any = case.compile(options, dynamic=False)
        found = [cm(**inputs, adapter_names=NAMES)["logits"]]
        if change is None:
            check_mixed(cm, case, NAMES, inputs)
        else:
            change(cm.model.layers[at])
            found.append(cm(**inputs, adapter_names=NAMES)["logits"])
        return found

    return run


def test_equal_layers_are_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = both_ways(monkeypatch, stack_run(case_of(Stack().eval(), tmp_path)))
    assert found.replayed == [LAYERS - 1]


def constant(layer: Any) -> None:
    layer.scale = 0.25


def sign(layer: Any) -> None:
    layer.scale = -0.5


def number(layer: Any) -> None:
    layer.scale = 1


def submodule(layer: Any) -> None:
    layer.gate = nn.ReLU()


def pre_hook(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def training(layer: Any) -> None:
    layer.training = True


#: What no layer may have in common with others that are replayed.
CHANGES = [
    constant,
    sign,
    number,
    activation,
    submodule,
    no_bias,
    eps,
    own_forward,
    hook,
    pre_hook,
    tied,
    dtype,
]


def test_layers_that_differ_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base: Any = Stack(count=len(CHANGES) + 3).eval()
    for layer, change in zip(base.layers[1:-1], CHANGES, strict=False):
        change(layer)
    found = both_ways(monkeypatch, stack_run(case_of(base, tmp_path)))
    assert found.replayed == [2]  # the last two


@pytest.mark.parametrize("change", [constant, own_forward, training])
def test_a_replayed_layer_may_change_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    torch.manual_seed(0)
    found = both_ways(monkeypatch, stack_run(case_of(Stack().eval(), tmp_path), change, at=3))
    assert found.replayed == [LAYERS - 1, LAYERS - 2]


class Tied(Stack):
    """Layers 1 and 2 have one weight; all have one table."""

    def __init__(self) -> None:
        super().__init__(Tabled)
        layers: Any = self.layers
        layers[2].norm.weight = layers[1].norm.weight
        for layer in layers:
            layer.table = layers[0].table


class Tabled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H))

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * self.table


class Changes(Stack):
    """Changes two of its layers before it calls them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        layers: Any = self.layers
        layers[0].scale, layers[3].sizes["width"] = 2.0, 2 * H
        found = super().forward(x)
        layers[0].scale = 0.5
        return found


class Twice(Stack):
    """Calls each layer twice."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in [*self.layers, *self.layers]:
            x = layer(x.clone())
        return {"logits": x}


class Several(Block):
    """Takes and returns several tensors; takes numbers, and a tensor that is also the first."""

    def forward(self, h: Any, first: Any = None, *, which: int = 0, more: Any = ()) -> Any:
        y = super().forward(h)
        if first is not None:
            y = y + first.sin()
        for item in more:
            y = y + item
        return y, (y.cos(), None, which), h


class Passing(Stack):
    def __init__(self) -> None:
        super().__init__(Several, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = x = x.clone()
        last = x.cos()
        for index, layer in enumerate(self.layers):
            x, (last, none, which), same = layer(
                x, first if index % 2 else x, which=int(index == 4), more=[last, first]
            )
            assert none is None
            x = x + which + same
        return {"logits": x}


class Counts(Block):
    """Counts its calls in something that was there before."""

    calls: ClassVar[list[int]] = []

    def forward(self, h: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(h) * len(self.calls)


class Counting(Stack):
    """Reads in each layer what the model has counted so far."""

    def __init__(self) -> None:
        super().__init__(Reading)
        self.counted = {"calls": 0}
        for layer in self.layers:
            layer.counted = self.counted

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.counted["calls"] = 0
        x = x.clone()
        for layer in self.layers:
            x = layer(x)
            self.counted["calls"] += 1
        return {"logits": x}


class Indexed(Block):
    """Reads its own place."""

    place = 0

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + torch.arange(8.0)[self.place]


class Cached(Block):
    """Writes into the place of a cache that is its own."""

    place = 0

    def forward(self, h: Tensor, cache: Any = None) -> Tensor:
        y = super().forward(h)
        cache[self.place] = y.sin()
        return y


class Caching(Stack):
    def __init__(self) -> None:
        super().__init__(Cached)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, cache = x.clone(), [x] * LAYERS
        for layer in self.layers:
            x = layer(x, cache)
        for item in cache:
            x = x + item
        return {"logits": x}


class Reading(Block):
    counted: dict[str, int]

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * (1 + self.counted["calls"])


class Draws(Block):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * (1 + 0 * random.random())


class Writes(Block):
    """Writes into what it is given."""

    def forward(self, h: Tensor) -> Tensor:
        h.mul_(2)
        return super().forward(h)


class Switching(Stack):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.clone()
        for index, layer in enumerate(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=index > 2):
                x = layer(x)
        return {"logits": x.float()}


class Nested(Block):
    """Has layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Block() for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h)
        for layer in self.inner:
            h = layer(h)
        return h


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (Tied, LAYERS - 2),
        (Changes, LAYERS - 3),
        (Twice, 2 * LAYERS - 1),
        (Passing, 1),
        (Indexed, 0),
        (Caching, 0),
        (Counts, 0),
        (Counting, 0),
        (Draws, 0),
        (Writes, None),
        (Switching, LAYERS - 2),
        (Nested, LAYERS + 1),
    ],
)
def test_layers_that_depend_on_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], count: int | None
) -> None:
    torch.manual_seed(0)
    base = kind() if issubclass(kind, Stack) else Stack(kind)
    case, inputs = case_of(base.eval(), tmp_path), torch.randn(3, 4, H)

    def run(options: dict[str, Any]) -> list[Tensor]:
        random.seed(0)
        Counts.calls.clear()
        cm: Any = case.compile(options, dynamic=False)
        return [cm(x=inputs.clone(), adapter_names=NAMES)["logits"] for _ in range(2)]

    found = both_ways(monkeypatch, run)
    if count is not None:
        assert found.replayed[0] == count


def test_another_dynamo_traces_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    class Other(replay_graph.InputBuilder):
        def __call__(self, value: object) -> Any:
            super().__call__(value)
            raise AttributeError("no such thing")

    monkeypatch.setattr(replay_graph, "InputBuilder", Other)
    found = both_ways(monkeypatch, stack_run(case_of(Stack().eval(), tmp_path)))
    assert found.replayed == [0]
