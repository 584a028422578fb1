"""Shortcuts change no bit: with each of them off, with all off and with all on, models answer the
same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, error
from stacks import H, constant, hook, stack
from tiny_models import VOCAB, token_inputs
from torch import Tensor, fx
from transformers import StaticCache

from lorafx.passes.write_back import WriteBack
from lorafx.torch_internals.shortcuts import SHORTCUTS

NAMES = ["a0", None, "a1"]
ALL = list(SHORTCUTS)
#: What is on, by a name for the setting. Only Inductor's lowerings ask for the others
#: than `needless_guards`.
SETTINGS = {
    "all off": [],
    **{f"without {name}": [other for other in ALL if other != name] for name in ALL},
}
OF_CAPTURE = ["all off", "without needless_guards"]

#: Calls a compiled model, and returns all that it has made.
Calls = Callable[[Any], Sequence[Tensor]]


def settings(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, of which `make test` runs the first: all off."""
    return [
        pytest.param(SETTINGS[n], id=n, marks=[pytest.mark.slow] * bool(i))
        for i, n in enumerate(names)
    ]


every_setting = pytest.mark.parametrize("on", settings(OF_CAPTURE))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compare(case: Case, on: Sequence[str], calls: Calls, **options: Any) -> list[Tensor]:
    """The same bits with all shortcuts as with those that are named; returns them."""
    answers = []
    for names in (ALL, on):
        torch._dynamo.reset()
        torch.manual_seed(0)
        cm = case.compile({"shortcuts": list(names), **options})
        answers.append(list(calls(cm)))
    with_all, without = answers
    assert len(with_all) == len(without) > 0
    assert all(torch.equal(*pair) for pair in zip(with_all, without, strict=True))
    return with_all


def twice(inputs: dict[str, Tensor]) -> Calls:
    """A mixed batch, and another one of the same sizes."""

    def calls(cm: Any) -> list[Tensor]:
        return [
            cm(**inputs, adapter_names=names)["logits"] for names in (NAMES, ["a1", "a2", None])
        ]

    return calls


@pytest.mark.slow
@every_setting
@pytest.mark.parametrize("family", ["gpt2"])
def test_models_of_transformers(case_of: Callable[[str], Case], family: str, on: list[str]) -> None:
    case, inputs = case_of(family), token_inputs(3, 5)
    first, _ = compare(case, on, twice(inputs))
    want = case.expected(NAMES, inputs)
    valid = inputs["attention_mask"].bool()
    assert error(first[valid], want[valid]) <= TOLERANCE


@pytest.mark.parametrize("on", settings(list(SETTINGS)))
@pytest.mark.slow
def test_inductor_with_a_static_cache(
    case_of: Callable[[str], Case], on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    run = WriteBack.run

    def noting(self: WriteBack, gm: fx.GraphModule, ctx: Any) -> int:
        written.append(run(self, gm, ctx))
        return written[-1]

    monkeypatch.setattr(WriteBack, "run", noting)
    case = case_of("llama")
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))

    def calls(cm: Any) -> list[Tensor]:
        past = StaticCache(config=cm._orig_mod.config, max_cache_len=9)
        past.early_initialization(3, 2, 6, torch.float32, torch.device("cpu"))
        given = {"past_key_values": past, "adapter_names": NAMES}
        found = [cm(input_ids=part, **given).logits for part in ids.split(1, dim=1)]
        for layer in past.layers:
            found += [layer.keys, layer.values]
        return found

    found = compare(case, on, calls, lowering="inductor")
    assert written == [4, 4 * ("written_back" in on)]  # keys and values of two layers
    want = case.expected(NAMES, {"input_ids": ids})
    assert error(torch.cat(found[:5], 1), want) <= TOLERANCE


def rows() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 5, H, generator=torch.Generator().manual_seed(1))}


def mixed(cm: Any) -> list[Tensor]:
    return [cm(**rows(), adapter_names=NAMES)["logits"] for _ in range(2)]


def check_oracle(case: Case, got: Tensor) -> None:
    assert error(got, case.expected(NAMES, rows())) <= TOLERANCE


@every_setting
def test_an_attribute_that_changes_after_the_first_call(tmp_path: Path, on: list[str]) -> None:
    case = stack(tmp_path)

    def calls(cm: Any) -> list[Tensor]:
        before = cm(**rows(), adapter_names=NAMES)["logits"]
        constant(cm._orig_mod.layers[2])
        after = cm(**rows(), adapter_names=NAMES)["logits"]
        hook(cm._orig_mod.layers[1])
        return [before, after, cm(**rows(), adapter_names=NAMES)["logits"]]

    first, second, third = compare(case, on, calls)
    check_oracle(case, first)
    case.merged.clear()
    constant(case.base.layers[2])  # type: ignore[index]
    check_oracle(case, second)
    case.merged.clear()
    hook(case.base.layers[1])  # type: ignore[index]
    check_oracle(case, third)
