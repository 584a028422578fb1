"""Registry: eligibility along the MRO, user entries over built-in ones."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafx.errors import ConfigError
from lorafx.registry import lookup, register, unregister

pytestmark = pytest.mark.quick


class Deep(NonDynamicallyQuantizableLinear):
    pass


class Deeper(Deep):
    pass


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


def test_registration_over_a_built_in_is_undone():
    built_in = lookup(nn.Linear(2, 2))
    entry = register(nn.Linear, weight="other")
    assert lookup(Deep(2, 2)) is entry
    unregister(nn.Linear)
    assert lookup(Deep(2, 2)) is built_in


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
