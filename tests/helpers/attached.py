"""Marked models under `torch.compile(backend="lorafx")`, checked against the dense-merge oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error, valid
from torch import Tensor, nn

import lorafx
from lorafx.compiled_model.compiled import compiled_of

Names = str | Sequence[str | None] | None
#: Inside, calls run in Python, and marks alone add what adapters change.
EAGER = partial(torch.compiler.set_stance, "force_eager")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Dynamo keeps graphs by code object: those of one test must not serve another."""
    torch._dynamo.reset()


def attached(case: Case, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of the base with all adapters, by the reference lowering unless said otherwise."""
    return lorafx.attach(case.model(), case.folders, options={**REFERENCE, **(options or {})})


def compiled(model: Any, **kwargs: Any) -> Any:
    """`torch.compile` with the backend, for any sizes where the test is marked `any_sizes`."""
    dynamic = cast(Any, lorafx.compile).__kwdefaults__["dynamic"]
    return torch.compile(model, backend="lorafx", **{"dynamic": dynamic, **kwargs})


@torch.no_grad()
def served(
    call: Callable[..., Any], model: nn.Module, names: Names, inputs: Mapping[str, Any]
) -> Tensor:
    """The logits of a call inside a block."""
    with lorafx.adapters(model, names):
        return call(**inputs)["logits"]


def check(
    call: Callable[..., Any],
    model: nn.Module,
    case: Case,
    names: Sequence[str | None],
    inputs: Mapping[str, Tensor],
) -> None:
    """The call gives the oracle's result, and each adapter did change its row."""
    got, want = served(call, model, names, inputs), case.expected(names, inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    base = case.expected([None] * len(names), inputs)
    for row, name in enumerate(names):
        if name not in (None, "__base__"):
            assert error(want[row], base[row]) > 100 * TOLERANCE


@torch.no_grad()
def check_base(call: Callable[..., Any], case: Case, inputs: Mapping[str, Tensor]) -> None:
    """Outside of any block the call gives the base model's own bits."""
    assert torch.equal(call(**inputs)["logits"], case.base(**inputs)["logits"])


def graphs(model: nn.Module) -> int:
    """Graphs of this model that Dynamo has handed over so far."""
    return compiled_of(model).recompiles
