"""The promises of passes over the model: a pass that breaks one is named, the model restored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from adapters_in_memory import factors_of, source_of
from torch import nn

from lorafx import LoraConfig
from lorafx.adapter_store.checkpoint import load_state
from lorafx.errors import VerifyError
from lorafx.model_passes import MODEL_PASSES, run_model_passes
from lorafx.passes.model_spec import MODEL_PROMISES
from lorafx.program.program import Preparation
from lorafx.program.promises import Promise

pytestmark = pytest.mark.quick

ORDER = [item.name for item in MODEL_PASSES]


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)


def prepared() -> Preparation:
    model = Siblings().eval()
    factors = {path: factors_of(model.get_submodule(path), 2, torch.randn) for path in ("q", "k")}
    saved = {"mine": load_state(source_of(model, factors), model)}
    return Preparation(model, LoraConfig(target_modules=["q", "k"]), saved=saved)


@dataclass
class Breaks:
    """A pass over the model that breaks something."""

    change: Callable[[Preparation], Any]
    name: str = "breaks"

    def run(self, model: Preparation) -> int:
        self.change(model)
        return 1


def swaps(model: Preparation) -> None:
    model.model.q, model.model.k = model.model.k, model.model.q


def renames(model: Preparation) -> None:
    (adapter,) = model.adapters
    weights = {"gone": adapter.weights["q"], "k": adapter.weights["k"]}
    model.adapters = [replace(adapter, weights=weights)]


def unhooks(model: Preparation) -> None:
    model.model.q._forward_hooks.clear()


def leaves_group(model: Preparation) -> None:
    attachment = model.attachment
    assert attachment is not None
    attachment.marks["q"].bank = replace(attachment.marks["q"].bank)


def unloads(model: Preparation) -> None:
    assert model.store is not None
    model.store.unload("mine")


def unpacks(model: Preparation) -> None:
    assert model.attachment is not None
    model.attachment.marks["k"].weight = None


BREAKS: dict[str, Callable[[Preparation], None]] = {
    "each site's path leads to its module": swaps,
    "each factor of an adapter is a site's": renames,
    "each site has its mark": unhooks,
    "each site has columns of one bank": leaves_group,
    "each adapter is in the store, and fits the banks": unloads,
    "the marks of packed sites take the pack": unpacks,
}


def test_every_promise_is_broken_once() -> None:
    assert list(BREAKS) == [promise.says for promise in MODEL_PROMISES]
    assert {promise.since for promise in MODEL_PROMISES} <= set(ORDER)


@pytest.mark.parametrize("promise", MODEL_PROMISES, ids=lambda promise: promise.says)
def test_the_pass_that_breaks_a_promise_is_named(promise: Promise[Any]) -> None:
    model = prepared()
    passes = (*MODEL_PASSES[: ORDER.index(promise.since) + 1], Breaks(BREAKS[promise.says]))
    said = f"pass 'breaks' broke a promise of '{promise.since}', \"{promise.says}\": "
    with pytest.raises(VerifyError) as caught:
        run_model_passes(model, passes)
    assert str(caught.value).startswith(said)
    assert not any(module._forward_hooks for module in model.model.modules())


def test_a_model_keeps_all_promises() -> None:
    model = prepared()
    run_model_passes(model)
    assert len(model.packed) == len(model.adapters) == 1
