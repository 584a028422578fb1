"""Weights that Python uses past their modules, in functions that Dynamo makes no graph of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attached import EAGER, fresh_dynamo  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, error
from quantised import torchao
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError

K = 6
BATCHES = (["a"] * 3, ["a", None, "b"])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.first(self.rest(torch.tanh(self.first(x))))}

    def rest(self, h: Tensor) -> Tensor:
        return self.past(h)

    def past(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w.weight, self.w.bias)


class KeptOut(Layers):
    @torch._dynamo.disable
    def rest(self, h: Tensor) -> Tensor:
        return self.past(h)


class InGenerator(Layers):
    def rest(self, h: Tensor) -> Tensor:
        def each() -> Iterator[Tensor]:
            torch._dynamo.graph_break()
            yield F.linear(h, self.w.weight, self.w.bias)

        return next(each())


class Caught(Layers):
    @torch._dynamo.disable
    def rest(self, h: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            return self.past(h)
        return h


class OfCopy(Layers):
    """A weight that Python makes of the site's own, for a graph."""

    @torch._dynamo.disable
    def made(self) -> Tensor:
        return self.w.weight * 2

    def rest(self, h: Tensor) -> Tensor:
        return h @ self.made().T


class Called(Layers):
    """The module itself: its mark comes after it."""

    @torch._dynamo.disable
    def rest(self, h: Tensor) -> Tensor:
        return self.w(h)


PAST = (KeptOut, InGenerator, Caught, OfCopy)


@pytest.mark.parametrize("cls", PAST)
def test_weights_past_their_modules_are_refused(small, cls):
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, K)}
    cm = case.compile()
    for names in BATCHES * 2:
        with pytest.raises(MatchError, match=rf"at w: aten.*{Path(__file__).name}"):
            cm(**inputs, adapter_names=names)
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


class Dequantised(Layers):
    """A weight in several tensors, none of which is the operand's own memory but in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(64, 64), nn.Linear(64, 64)

    @torch._dynamo.disable
    def rest(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w.weight.dequantize())


@pytest.mark.parametrize("start", ["compiled", "eager"])
@pytest.mark.parametrize("names", BATCHES)
def test_parts_of_composite_weights_are_weights(small, start, names):
    case = small(Dequantised, ["first", "w"])
    torchao("Int8WeightOnlyConfig")(case.base)
    cm = case.compile({"start": start, "cache": None})
    with pytest.raises(MatchError, match="at w: aten"):
        cm(x=torch.randn(3, 4, 64), adapter_names=names)


@pytest.mark.parametrize(("cls", "target"), [(KeptOut, "first"), (Called, "w")])
def test_what_reads_no_weight_of_a_site_is_served(small, cls, target):
    case, inputs = small(cls, [target]), {"x": torch.randn(3, K)}
    cm = case.compile()
    for _ in range(2):
        found = cm(**inputs, adapter_names=["a"] * 3)["logits"]
        assert error(found, case.expected(["a"] * 3, inputs)) <= 1e-5


@pytest.mark.parametrize("cls", [KeptOut, InGenerator])
def test_marked_models_in_eager_mode(small, cls):
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, K)}
    model = lorafx.attach(case.model(), case.folders)
    with torch.no_grad():
        for names in BATCHES:
            refused = pytest.raises(MatchError, match="at w: aten")
            with refused, lorafx.adapters(model, names), EAGER():
                model(**inputs)
        with lorafx.adapters(model, ["a"] * 3):
            assert model.w.weight.norm() > 0  # the user's own, between two calls
        assert torch.equal(model(**inputs)["logits"], case.base(**inputs)["logits"])


def test_marked_models_that_users_compile(small):
    case, inputs = small(InGenerator, ["w"]), {"x": torch.randn(3, K)}
    model = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    call = torch.compile(model, backend="lorafx")
    with torch.no_grad():
        for names in BATCHES * 2:
            with pytest.raises(MatchError, match="at w: aten"), lorafx.adapters(model, names):
                call(**inputs)
