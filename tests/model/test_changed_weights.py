"""Weights that lie in one buffer and are changed past lorafx, under a compiled model.

It serves what the model is now, and what was taken out of the model stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from dense_merge import TOLERANCE, Case, case_by_targets, error, random_base
from tiny_models import Family
from torch import Tensor, nn

from lorafx.errors import CaptureError

pytestmark = pytest.mark.quick

NAMES = ["a", None, "b", "a"]
X = torch.randn(len(NAMES), 8, generator=torch.Generator().manual_seed(3))


class Gated(nn.Module):
    """Siblings that share x; one of them has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tanh(self.left(x)) * self.right(x)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder: Path = tmp_path_factory.mktemp("gated")
    return case_by_targets(random_base(Family(Gated, ())), folder, {"a": ".*", "b": "right"})


def check(cm: nn.Module, case: Case) -> None:
    """The compiled model's answers are those of the weights that it has now."""
    now = Case(copy.deepcopy(case.base), case.folders)
    now.base.right.bias = None
    for name, value in cm._orig_mod.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(now.base.get_submodule(owner), last, nn.Parameter(value.clone(), False))
    got = cm(x=X, adapter_names=NAMES)["logits"]
    assert error(got, now.expected(NAMES, {"x": X})) <= TOLERANCE


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


@contextmanager
def swapped(model: nn.Module) -> Iterator[None]:
    """As averaged weights are tried: each tensor is exchanged, not copied."""
    others = other_weights(model)

    def exchange() -> None:
        for name, parameter in model.named_parameters():
            others[name], parameter.data = parameter.data, others[name]

    exchange()
    yield
    exchange()


@contextmanager
def replaced(model: nn.Module) -> Iterator[None]:
    """As `torch.func.functional_call` does, with tensors that are no parameters."""
    others = other_weights(model)

    def exchange() -> None:
        for name in others:
            owner, _, last = name.rpartition(".")
            held = model.get_submodule(owner)._parameters
            held[last], others[name] = others[name], held[last]

    exchange()
    yield
    exchange()
    values = other_weights(model)
    assert all(torch.equal(value, values[name]) for name, value in others.items())


@contextmanager
def with_a_bias(model: nn.Module) -> Iterator[None]:
    """Where a sibling has one, and so the packed weights too."""
    model.right.bias = nn.Parameter(torch.randn(8), requires_grad=False)
    yield
    model.right.bias = None


@pytest.mark.parametrize("change", [swapped, replaced, with_a_bias], ids=lambda c: c.__name__)
def test_for_a_while(change: Callable[[nn.Module], object], case: Case) -> None:
    cm = case.compile()
    assert len(cm._session.program.packed) == 1
    check(cm, case)
    before = {name: value.clone() for name, value in cm._orig_mod.state_dict().items()}
    with change(cm._orig_mod):
        check(cm, case)
        check(cm, case)
    after = cm._orig_mod.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    check(cm, case)
    assert cm._session.program.pack_watch.intact


def test_memory_that_is_shared_with_other_processes(case: Case) -> None:
    """It is other memory, for the buffer and all that lies in it."""
    cm = case.compile()
    cm._orig_mod.share_memory()
    (packed,) = cm._session.program.packed
    check(cm, case)
    assert cm._session.program.pack_watch.intact
    assert packed.weight.is_shared()
    assert all(parameter.is_shared() for parameter in cm._orig_mod.parameters())


def test_before_they_are_packed(case: Case) -> None:
    """An eager call finds what was written; a cast is refused as for packed ones."""
    cm = case.compile({"start": "eager", "cache": None})
    cm.load_state_dict(other_weights(cm._orig_mod))
    check(cm, case)
    assert not cm._session.program.pack_watch.intact
    cm._orig_mod.bfloat16()
    with pytest.raises(CaptureError, match=r"changed shape, dtype.* torch.float32: .*detach\(\)"):
        check(cm, case)
