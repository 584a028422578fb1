"""Weights that Python uses past their modules, in functions that Dynamo makes no graph of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attached import fresh_dynamo
from dense_merge import REFERENCE, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError

__all__ = ["fresh_dynamo"]

K = 6
BATCHES = (["a"] * 3, ["a", None, "b"])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"logits": self.first(self.rest(torch.tanh(self.first(x)), **kwargs))}

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


class Switched(Layers):
    def rest(self, h: Tensor, kept_out: bool = False) -> Tensor:
        return self.kept(h) if kept_out else self.w(h)

    @torch._dynamo.disable
    def kept(self, h: Tensor) -> Tensor:
        return self.past(h)


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


class Tied(Called):
    """The weight of an embedding that is no site, looked up by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(K, K)
        self.names.weight = self.w.weight

    @torch._dynamo.disable
    def rest(self, h: Tensor) -> Tensor:
        return self.w(h) + self.names(torch.ones(h.shape[0], dtype=torch.int64))


PAST = (KeptOut, InGenerator, Caught, OfCopy)


@pytest.mark.parametrize("cls", PAST)
def test_weights_past_their_modules_are_refused(small, cls):
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, K)}
    cm = case.compile(dynamic=False)
    for names in BATCHES * 2:
        with pytest.raises(MatchError, match=rf"at w: aten.*{Path(__file__).name}"):
            cm(**inputs, adapter_names=names)
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


def test_adapters_of_other_modules_are_served(small):
    case, inputs = small(KeptOut, ["first"]), {"x": torch.randn(3, K)}
    found = case.compile(dynamic=False)(**inputs, adapter_names=["a"] * 3)["logits"]
    assert error(found, case.expected(["a"] * 3, inputs)) <= 1e-5


def test_a_function_that_is_given_up_later(small):
    """Its first calls, of the base and with an adapter, go another way."""
    case, x = small(Switched, ["w"]), torch.randn(3, K)
    cm = case.compile(dynamic=False)
    for names in (None, ["a"] * 3):
        cm(x=x, adapter_names=names)
    cm(x=x, kept_out=True)
    for names in BATCHES * 2:
        with pytest.raises(MatchError, match="at w: aten"):
            cm(x=x, kept_out=True, adapter_names=names)
    found = cm(x=x, adapter_names=["b"] * 3)["logits"]
    assert error(found, case.expected(["b"] * 3, {"x": x})) <= 1e-5


@pytest.mark.parametrize("cls", [Called, Tied])
def test_what_reads_no_weight_of_a_site_is_served(small, cls):
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, K)}
    cm = case.compile(dynamic=False)
    for _ in range(2):
        found = cm(**inputs, adapter_names=["a"] * 3)["logits"]
        assert error(found, case.expected(["a"] * 3, inputs)) <= 1e-5


@pytest.mark.parametrize("cls", [KeptOut, InGenerator])
def test_marked_models_in_eager_mode(small, cls):
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, K)}
    model = lorafx.attach(case.model(), case.folders)
    with torch.no_grad():
        for names in BATCHES:
            with pytest.raises(MatchError, match="at w: aten"), lorafx.adapters(model, names):
                model(**inputs)
        with lorafx.adapters(model, ["a"] * 3):
            assert model.w.weight.norm() > 0  # the user's own, between two calls
        assert torch.equal(model(**inputs)["logits"], case.base(**inputs)["logits"])


def test_marked_models_that_users_compile(small, fresh_dynamo):
    case, inputs = small(InGenerator, ["w"]), {"x": torch.randn(3, K)}
    model = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    call = torch.compile(model, backend="lorafx")
    with torch.no_grad():
        for names in BATCHES * 2:
            with pytest.raises(MatchError, match="at w: aten"), lorafx.adapters(model, names):
                call(**inputs)
