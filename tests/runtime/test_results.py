"""What a call returns: values, and never code that would run later without its adapters."""

from __future__ import annotations

import dataclasses
import timeit
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, error
from torch import Tensor, nn
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution
from transformers import BatchFeature, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

import lorafx
from lorafx.errors import CaptureError, MatchError
from lorafx.runtime.results import refuse_code

K = 6
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    logits: Any
    more: Any = None


class Later:
    """An object that computes when it is asked."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x

    def answer(self) -> Tensor:
        return self.module(self.x)


class Slots:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


def lazily(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield module(x)


async def awaited(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


LAZY: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "generator": (lazily, "a generator"),
    "coroutine": (awaited, "a coroutine"),
    "generator expression": (lambda w, x: (w(row) for row in x), "a generator"),
    "map": (lambda w, x: map(w, x), r"a Linear"),
    "zip": (lambda w, x: zip(lazily(w, x), [1], strict=True), "a generator"),
    "partial": (lambda w, x: partial(w, x), "a Linear"),
    "method": (lambda w, x: {"next": w.forward}, r"a method at \['next'\]"),
    "closure": (lambda w, x: {"out": [x, lambda: w(x)]}, r"a function at \['out'\]\[1\]"),
    "dataclass": (lambda w, x: Output(x, Pair(x, lambda: w(x))), r"a function at \.more\[1\]"),
    "object": (lambda w, x: (x, Later(w, x)), r"a Linear at \[1\]\.module"),
    "slots": (lambda w, x: Slots(partial(w, x)), "a Linear"),
    "deque": (lambda w, x: deque([w]), r"a Linear at \[0\]"),
    "output": (
        lambda w, x: BaseModelOutput(last_hidden_state=lazily(w, x)),
        r"a generator at \['last_hidden_state'\]",
    ),
    "values": (lambda w, x: {"a": lambda: w(x)}.values(), "a function"),
}


class Returning(nn.Module):
    """Returns what `made`, an attribute that a test sets, makes of its module and its input."""

    made: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)
        self.made = LAZY["map"][0]

    @torch._dynamo.disable
    def rest(self, x: Tensor) -> Any:
        return self.made(self.w, x)

    def forward(self, x: Tensor) -> Any:
        return self.rest(x + 1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """The model on a road, and the one that was given; each is compiled once."""
    from dense_merge import save_adapter

    torch.manual_seed(0)
    base = Returning().eval().requires_grad_(False)
    folder = save_adapter(base, tmp_path_factory.mktemp("a"), rank=2, targets=["w"], seed=1)
    case, made = Case(base, {"a": folder}), dict[str, tuple[Any, Any]]()

    def of(road: str) -> tuple[Any, Any]:
        if road not in made:
            model = case.model()
            options = {"lowering": "reference", "start": road, "cache": None}
            made[road] = lorafx.compile(model, case.folders, options=options), model
        return made[road]

    return of


@pytest.mark.parametrize("road", ["eager", "compiled"])
def test_code_in_a_result_is_refused_where_it_is(served: Any, road: str) -> None:
    cm, model = served(road)
    x = torch.randn(2, K)
    for name, (made, place) in LAZY.items():
        model.made = made
        with pytest.raises(CaptureError, match=f"forward of Returning (is|holds) {place}"):
            cm(x, adapter_names=["a", "a"])
        result = cm(x)  # the base's own
        if name == "coroutine":
            result.close()


VALUES: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda x: None,
    "containers": lambda x: {"logits": [x, (x, {"more": {x}})], "size": x.shape, "kind": x.dtype},
    "ordered": lambda x: OrderedDict(b=x, a=3.0),
    "dataclass": lambda x: Output(x, Pair(x, "text")),
    "slots": lambda x: Slots([x]),
    "iterators": lambda x: (iter([x]), zip([x], [x], strict=True), map(torch.relu, [x])),
    "features": lambda x: BatchFeature({"logits": x}),
    "distributions": lambda x: TransformedDistribution(
        Independent(Normal(x, x.exp()), 1), [AffineTransform(0.0, x)]
    ),
    "caches": lambda x: CausalLMOutputWithPast(
        logits=x, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())
    ),
    "a class": lambda x: Output(x, DynamicCache),
    "a cycle": lambda x: (held := [x]).append(held) or held,
}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_are_returned(name: str) -> None:
    refuse_code(VALUES[name](torch.randn(2, 3)), "the forward")


def test_a_decode_step_is_looked_at_in_microseconds() -> None:
    cache = DynamicCache()
    for layer in range(32):
        cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
    result = CausalLMOutputWithPast(logits=torch.zeros(1, 1, 8), past_key_values=cache)
    calls = 2000
    seconds = min(timeit.repeat(lambda: refuse_code(result, ""), number=calls, repeat=5)) / calls
    assert seconds < 20e-6


class Keeping(nn.Module):
    """Keeps code for later."""

    later: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.keep(x)
        return {"logits": self.w(x)}

    @torch._dynamo.disable
    def keep(self, x: Tensor) -> None:
        self.later = partial(self.w, x)


@pytest.mark.parametrize("road", ["eager", "compiled"])
def test_code_that_a_model_keeps_is_no_base_in_silence(small: Any, road: str) -> None:
    case = small(Keeping, ["w"])
    model = case.model()
    options = {"lowering": "reference", "start": road, "cache": None}
    cm = lorafx.compile(model, case.folders, options=options)
    x = torch.randn(2, K)
    cm.set_adapter("a")
    assert error(cm(x=x)["logits"], case.expected(["a", "a"], {"x": x})) <= TOLERANCE
    with pytest.raises(MatchError, match="'a' is the default"):
        model.later()
    cm.set_adapter(None)
    with torch.no_grad():
        assert torch.equal(model.later(), case.base.w(x))
