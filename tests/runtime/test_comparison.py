"""A graph is offered only where its answer is the one that eager mode has given."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, error
from tiny_models import plain_inputs, token_inputs
from torch import Tensor, nn
from waiting import LONG

from lorafx.capture.lowering import NodeByNode
from lorafx.eager.deltas import RowDeltas
from lorafx.errors import LorafxWarning, VerifyError
from lorafx.runtime.beside.comparison import answer_of, bound_of, distance
from lorafx.torch_internals.versions import saves_graphs

pytestmark = [pytest.mark.any_sizes, pytest.mark.usefixtures("compiled_beside")]

needs_saving = pytest.mark.skipif(not saves_graphs(), reason="torch cannot save graphs")

SECONDS = float(LONG)
NAMES = ["a0", None, "a1"]


def started(case: Case, **options: Any) -> Any:
    return case.compile({"start": "eager", "cache": None, **options})


def called_until_compiled(cm: Any, inputs: dict[str, Tensor], names: list[Any]) -> list[Tensor]:
    answers = [cm(**inputs, adapter_names=names)["logits"] for _ in range(2)]
    assert cm.wait(SECONDS)
    return answers


def tiers(cm: Any) -> list[str]:
    return [kind.tier for kind in cm.status().kinds]


@needs_saving
def test_calls_are_refused_where_eager_mode_and_the_graph_differ(
    plain: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = RowDeltas.add

    def lost(self: Any, mark: Any, x: Tensor, y: Tensor, *rest: Any) -> Tensor:
        self._touched -= {"up"}
        return add(self, mark, x, y, *rest)

    monkeypatch.setattr(RowDeltas, "add", lost)
    cm, inputs = started(plain), plain_inputs(3, 5)
    called_until_compiled(cm, inputs, NAMES)
    assert tiers(cm) == ["refused"]
    for _ in range(2):
        with pytest.raises(VerifyError, match=r"first at up\. One of the two is wrong"):
            cm(**inputs, adapter_names=NAMES)
    assert "refused" in str(cm.status())
    cm(**inputs)  # another kind of call


@needs_saving
def test_calls_stay_eager_where_a_graph_is_lowered_wrongly(
    plain: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NodeByNode.__call__

    def wrong(self: NodeByNode, arguments: list[Any]) -> Any:
        return [item * 1.01 for item in run(self, arguments)]

    monkeypatch.setattr(NodeByNode, "__call__", wrong)
    cm, inputs = started(plain), plain_inputs(3, 5)
    with pytest.warns(LorafxWarning, match="calls stay eager.*gives other numbers than eager mode"):
        called_until_compiled(cm, inputs, NAMES)
    got = cm(**inputs, adapter_names=NAMES)["logits"]
    assert error(got, plain.expected(NAMES, inputs)) <= TOLERANCE
    assert tiers(cm) == ["kept eager"]


@pytest.mark.slow
@needs_saving
def test_each_run_begins_with_the_calls_own_cache(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's run has written the cache when the graph is run operator by operator."""
    run = NodeByNode.__call__

    def wrong(self: NodeByNode, arguments: list[Any]) -> Any:
        return [item * 1.01 if item.is_floating_point() else item for item in run(self, arguments)]

    monkeypatch.setattr(NodeByNode, "__call__", wrong)
    cm, ids = started(llama), token_inputs(3, 5)["input_ids"]

    def generated_until_compiled() -> None:
        for _ in range(2):
            cm.generate(ids, adapter_names=NAMES, max_new_tokens=4, pad_token_id=0)
        assert cm.wait(SECONDS)

    with pytest.warns(LorafxWarning, match="calls stay eager"):
        generated_until_compiled()
    assert {*tiers(cm)} == {"kept eager"}


class Counting(nn.Module):
    """Its buffer counts calls, and the result depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        return {"logits": self.up(x) * self.calls}


@needs_saving
def test_a_comparison_changes_nothing_that_the_model_counts(small: Any) -> None:
    cm, x, names = started(small(Counting, ["up"])), torch.randn(3, 12), ["a", None, "b"]
    first, second = called_until_compiled(cm, {"x": x}, names)
    third = cm(x=x, adapter_names=names)["logits"]
    assert tiers(cm) == ["ready"]
    assert error(second, 2 * first) <= TOLERANCE
    assert error(third, 3 * first) <= TOLERANCE


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.up(x + torch.randn_like(x))}


@needs_saving
def test_what_draws_random_numbers_is_not_compared(small: Any) -> None:
    cm, x, names = started(small(Noisy, ["up"])), torch.randn(3, 12), ["a", None, "b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        called_until_compiled(cm, {"x": x}, names)
        cm(x=x, adapter_names=names)
    assert tiers(cm) == ["ready"]


def test_padding_and_numbers_that_are_none_do_not_count() -> None:
    inputs = token_inputs(2, 4)
    mask = inputs["attention_mask"] = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    logits = torch.randn(2, 4, 3)
    state = torch.get_rng_state()
    logits[1, 1] = float("inf")
    logits[1, 2] = float("nan")
    padded = torch.where(mask[..., None] == 0, 7.0, logits)
    one, two = (answer_of(inputs, state, {"logits": item}) for item in (logits, padded))
    assert distance(one, two) == 0
    padded[1, 3] += 1
    assert distance(one, answer_of(inputs, state, {"logits": padded})) > 1
    assert distance(one, []) == float("inf")


def test_a_result_that_is_wider_than_the_weights_has_their_bound(plain: Case) -> None:
    program = started(plain)._session.program
    program.model.bfloat16()
    want = torch.randn(3, 4)
    got = [want.bfloat16().float()]
    assert distance([want], got) > 1
    assert distance([want], got, bound_of(program)) <= 1
