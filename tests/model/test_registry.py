"""Registry: eligibility along the MRO, user entries over built-in ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafx.errors import ConfigError
from lorafx.registry import lookup, register, unregister

pytestmark = pytest.mark.quick


class Deep(NonDynamicallyQuantizableLinear):
    pass


class Deeper(Deep):
    pass


class Projection(nn.Module):
    """Not a Linear at all: sizes and weight under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel


@pytest.fixture
def registered():
    added: list[type] = []

    def add(cls, **kwargs):
        added.append(cls)
        return register(cls, **kwargs)

    yield add
    for cls in dict.fromkeys(added):
        unregister(cls)


def test_subclasses_are_eligible_with_their_base():
    entry = lookup(Deeper(3, 5))
    assert entry is not None
    assert entry.cls is nn.Linear
    assert entry.kind == "linear"
    assert entry.sizes(Deeper(3, 5)) == (3, 5)
    assert lookup(nn.Embedding(7, 4)).sizes(nn.Embedding(7, 4)) == (7, 4)
    assert lookup(nn.Embedding(7, 4)).kind == "embedding"


def test_other_classes_are_not():
    for module in (nn.LayerNorm(3), nn.Bilinear(2, 2, 2), nn.ReLU(), nn.EmbeddingBag(3, 2)):
        assert lookup(module) is None


def test_nearest_entry_wins(registered):
    registered(Deep, weight="packed")
    assert lookup(Deeper(2, 2)).weight == "packed"
    assert lookup(NonDynamicallyQuantizableLinear(2, 2)).weight == "weight"


def test_user_registration_by_function_and_name(registered):
    assert lookup(Projection()) is None
    entry = registered(
        Projection,
        in_features=lambda m: m.kernel.shape[0],
        out_features=lambda m: m.kernel.shape[1],
        weight="kernel",
        transposed=True,
    )
    assert lookup(Projection()) is entry
    assert entry.sizes(Projection()) == (5, 3)
    assert entry.transposed


def test_registration_over_a_built_in_is_undone():
    built_in = lookup(nn.Linear(2, 2))
    entry = register(nn.Linear, weight="other")
    assert lookup(Deep(2, 2)) is entry
    unregister(nn.Linear)
    assert lookup(Deep(2, 2)) is built_in


def test_parametrised_modules_stay_eligible():
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    assert lookup(module).sizes(module) == (3, 5)


def test_transformers_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = pytorch_utils.Conv1D(nf=6, nx=4)
    entry = lookup(module)
    assert entry.cls is pytorch_utils.Conv1D
    assert entry.transposed
    assert entry.sizes(module) == (4, 6)
    assert lookup(type("Sub", (pytorch_utils.Conv1D,), {})(6, 4)).cls is pytorch_utils.Conv1D


def test_refusals():
    with pytest.raises(ConfigError, match=r"takes an nn\.Module class, got <class 'int'>"):
        register(int)
    with pytest.raises(ConfigError, match=r"takes an nn\.Module class"):
        register(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"kind is one of .*, got 'conv'"):
        register(nn.Conv1d, kind="conv")
    with pytest.raises(ConfigError, match="Conv2d was not registered"):
        unregister(nn.Conv2d)
