"""What is reached through a compiled model and is not its own: methods and parts of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, error
from tiny_models import seq2seq_inputs, token_inputs
from torch import Tensor, nn

import lorafx
from lorafx.errors import BatchError, CaptureError, MatchError, UnknownAdapterError

FIXED = {"pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 4, "max_new_tokens": 4}
#: A prompt and a step: two sizes.
SHORT = {**FIXED, "min_new_tokens": 2, "max_new_tokens": 2}


class Encoder(nn.Module):
    """A model whose users call more than its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(torch.tanh(self.first(x)))}

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.second.weight)  # past the mark

    def twice(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self(x)["logits"] * scale + self.encode(x)

    def outside(self, x: Tensor) -> Tensor:
        return torch._dynamo.disable(lambda y: self.seen(y))(self.first(x))

    def seen(self, y: Tensor) -> Tensor:
        return y

    def each(self, x: Tensor) -> Iterator[Tensor]:
        yield self.first(x)

    async def later(self, x: Tensor) -> Tensor:
        return self.first(x)

    def describe(self) -> str:
        return f"{self.first.in_features} features"


@pytest.fixture
def encoder(small):
    return small(Encoder, ["first", "second"])


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
MIX = ["a", None, "b"]


def rows(case: Any, names: list[str | None], use: Any) -> Tensor:
    return torch.cat([use(case.alone(name), X[row : row + 1]) for row, name in enumerate(names)])


class Head(nn.Module):
    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first = first

    def pooled(self, x: Tensor) -> Tensor:
        return self.first(x).mean(1)


def test_a_method_of_a_module_that_was_added_later_is_served_too(encoder):
    cm = encoder.compile()
    cm.encode(X, adapter_names=MIX)
    cm._orig_mod.head = Head(cm._orig_mod.first)
    cm._orig_mod.pooled = cm._orig_mod.head.pooled
    want = rows(encoder, MIX, lambda model, x: model.first(x).mean(1))
    assert error(cm.pooled(X, adapter_names=MIX), want) <= 1e-5


@pytest.mark.parametrize("name", ["encode", "twice"])
def test_a_method_of_the_model_is_served_like_a_call(encoder, name):
    def use(model: Any, x: Tensor) -> Tensor:
        return getattr(model, name)(x)

    cm = encoder.compile(dynamic=True)
    assert torch.equal(use(cm, X), use(encoder.base, X))
    cm.set_adapter("b")
    assert error(use(cm, X), rows(encoder, ["b"] * 3, use)) <= 1e-5
    got = getattr(cm, name)(X, adapter_names=MIX)
    assert error(got, rows(encoder, MIX, use)) <= 1e-5
    graphs = cm.recompiles
    assert (
        error(getattr(cm, name)(x=X[:2], adapter_names=[None, "a"]), use(encoder.base, X)[:2]) > 0
    )
    cm.set_adapter("a")
    use(cm, torch.randn(5, 2, 6))
    assert cm.recompiles == graphs
    cm.set_adapter(None)
    assert torch.equal(use(cm, X), use(encoder.base, X))
    with pytest.raises(UnknownAdapterError):
        getattr(cm, name)(X, adapter_names=["c"] * 3)
    with pytest.raises(BatchError, match="adapter_names has 2 entries"):
        getattr(cm, name)(X, adapter_names=["a", None])


def test_a_method_in_a_function_that_users_compile(encoder):
    cm = encoder.compile()
    want = rows(encoder, MIX, Encoder.encode)
    step = torch.compile(lambda x: cm.encode(x, adapter_names=MIX) * 2, backend="eager")
    assert error(step(X), want * 2) <= 1e-5
    assert cm.recompiles == 1


def test_methods_while_an_adapter_is_merged(encoder):
    cm = encoder.compile()
    cm.merge("a")
    assert error(cm.encode(X), rows(encoder, ["a"] * 3, Encoder.encode)) <= 1e-5
    assert (
        error(cm.second(X @ torch.eye(6, 7)), encoder.alone("a").second(X @ torch.eye(6, 7))) < 1e-5
    )
    with pytest.raises(BatchError, match="'a' is merged"):
        cm.encode(X, adapter_names=MIX)
    cm.unmerge()


@pytest.mark.parametrize("name", ["each", "later"])
def test_a_body_that_runs_after_the_call_is_refused(encoder, name):
    cm = encoder.compile()
    cm.set_adapter("a")
    message = rf"result of the {name} of Encoder is a (generator|coroutine)"
    with pytest.raises(CaptureError, match=message):
        getattr(cm, name)(X)
    cm.set_adapter(None)
    getattr(cm, name)(X).close()


def test_a_call_inside_of_a_call_leaves_its_batch(encoder):
    """Python that a graph break leaves may call the compiled model for something else."""
    cm = encoder.compile()
    inner: list[Tensor] = []

    def seen(y: Tensor) -> Tensor:
        inner.append(cm.encode(X[:2], adapter_names=["b", None]))
        return cm._orig_mod.second(y)

    cm._orig_mod.seen = seen
    got = cm.outside(X, adapter_names=["a"] * 3)
    alone = encoder.alone("a")
    assert error(got, alone.second(alone.first(X))) <= 1e-5
    assert error(inner[0], rows(encoder, ["b", None], Encoder.encode)) <= 1e-5


@pytest.mark.parametrize(
    "use",
    [
        lambda cm: cm.first(X),
        lambda cm: cm._orig_mod(X),
        lambda cm: cm._orig_mod.encode(X),
        lambda cm: cm.get_submodule("first")(X),
    ],
)
def test_parts_by_themselves_are_the_base_s_or_raise(encoder, use):
    cm = encoder.compile()
    base = use(cm)
    cm.set_adapter("a")
    with pytest.raises(MatchError, match=r"first \(Linear\) runs outside.* 'a' is the default"):
        use(cm)
    cm(X, adapter_names=MIX)
    with pytest.raises(MatchError, match="runs outside"):
        use(cm)
    copied = copy.deepcopy(cm._orig_mod)
    assert torch.equal(copied(X)["logits"], encoder.base(X)["logits"])
    cm.set_adapter(None)
    again = use(cm)
    assert torch.equal(torch.as_tensor(_plain(again)), _plain(base))
    cm.set_adapter("a")
    assert torch.equal(cm.detach()(X)["logits"], encoder.base(X)["logits"])


def _plain(value: Any) -> Tensor:
    return value["logits"] if isinstance(value, dict) else value


def test_a_part_that_the_adapter_leaves_alone_is_the_base_s(small):
    case = small(Encoder, ["second"])
    cm = lorafx.compile(case.model(), lorafx.LoraConfig(), adapters=case.folders, options=REFERENCE)
    cm.set_adapter("a")
    assert torch.equal(cm.first(X), case.base.first(X))


# transformers


@pytest.mark.parametrize(
    "use",
    [
        lambda cm, x: cm.init_continuous_batching(),
        lambda cm, x: cm.continuous_batching_context_manager(),
        lambda cm, x: cm.generate(**x, cache_implementation="paged"),
        lambda cm, x: cm.add_adapter(None),
        lambda cm, x: cm.disable_adapters(),
        lambda cm, x: cm.get_compiled_call(None),
    ],
)
def test_methods_of_transformers_that_are_refused(llama, use):
    cm = llama.compile()
    cm.set_adapter("a1")
    with pytest.raises(CaptureError, match=r"\w+\(\) (runs|starts|is about|compiles).*(use|call) "):
        use(cm, token_inputs(2, 4))
    assert "generate" not in vars(cm._orig_mod)
    assert "generate_batch" not in vars(cm._orig_mod)


@pytest.mark.slow
def test_an_encoder_by_itself(case_of):
    case = case_of("t5", num_layers=1, num_decoder_layers=1)
    cm, inputs = case.compile(), seq2seq_inputs(2, 5)
    ids = inputs["input_ids"]
    assert torch.equal(cm.get_encoder()(ids)[0], case.base.get_encoder()(ids)[0])
    cm.set_adapter("a0")
    with pytest.raises(MatchError, match="runs outside"):
        cm.get_encoder()(ids)
    with pytest.raises(MatchError, match="runs outside"):
        cm._orig_mod(**inputs)
    want = case.alone("a0").generate(input_ids=ids, **SHORT)
    assert torch.equal(cm.generate(input_ids=ids, **SHORT), want)


@pytest.mark.slow
def test_generate_in_a_method(llama, monkeypatch):
    """Dynamo cannot trace `generate`; here it runs in Python, its forwards compiled."""

    def answer(self: Any, input_ids: Tensor) -> Tensor:
        return self.generate(input_ids=input_ids, **FIXED)[:, input_ids.shape[1] :]

    monkeypatch.setattr(type(llama.base), "answer", answer, raising=False)
    cm, ids = llama.compile(), token_inputs(3, 5)["input_ids"]
    names = ["a1", None, "a0"]
    got = cm.answer(ids, adapter_names=names)
    want = [llama.alone(name).answer(ids[row : row + 1]) for row, name in enumerate(names)]
    assert torch.equal(got, torch.cat(want))
    cm.set_adapter("a3")
    graphs = cm.recompiles
    assert torch.equal(cm.answer(ids), llama.alone("a3").answer(ids))
    assert cm.recompiles == graphs
    cm.set_adapter(None)
    assert torch.equal(cm.answer(ids), llama.base.answer(ids))
