"""New base weights under a merged adapter: the merge follows, and unmerge gives the new base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, build_case, error, valid
from merging import bits
from namings import new_weights
from tiny_models import token_inputs
from torch import Tensor, nn

from lorafx.errors import BaseWeightsError, CaptureError

pytestmark = pytest.mark.usefixtures("fixed_sizes")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


def check(cm: Any, base: nn.Module, case: Case, name: str) -> None:
    """The merged model is dense merge into `base`, and unmerged its every bit is back."""
    inputs = token_inputs(3, 5)
    with torch.no_grad():
        got = cm.model(**inputs)["logits"]
    want = Case(base, case.folders).expected([name] * 3, inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    cm.unmerge()
    state = cm.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())


def test_the_merge_follows_the_weights(case: Case) -> None:
    cm = case.compile()
    cm.merge("a1")
    base = new_weights(case.base, 21)
    held = {name: p.data_ptr() for name, p in cm.model.named_parameters()}
    cm.load_weights(base.state_dict())
    assert cm.merged == "a1"
    assert held == {name: p.data_ptr() for name, p in cm.model.named_parameters()}
    check(cm, base, case, "a1")


def test_what_is_refused_leaves_the_merged_weights(case: Case) -> None:
    cm = case.compile()
    cm.merge("a1")
    merged = bits(cm.model)
    pairs = [*new_weights(case.base, 24).state_dict().items(), ("nobody", torch.ones(3))]
    with pytest.raises(BaseWeightsError, match="nobody"):
        cm.load_weights(pair for pair in pairs)
    assert cm.merged == "a1"
    assert all(torch.equal(cm.model.state_dict()[key], value) for key, value in merged.items())
    check(cm, case.base, case, "a1")


def test_an_interrupted_update(case: Case, tmp_path: Path) -> None:
    """Nothing is served, merged or written until all weights have come."""
    cm = case.compile()
    cm.merge("a1")
    base, rounds = new_weights(case.base, 27), iter([10**6, 3])

    def pairs() -> Iterator[tuple[str, Tensor]]:
        last = next(rounds)
        for number, pair in enumerate(base.state_dict().items()):
            if number == last:
                raise OSError("the trainer is gone")
            yield pair

    with pytest.raises(OSError, match="the trainer is gone"):
        cm.load_weights(pairs)
    for call in (
        lambda: cm(**token_inputs(3, 5)),
        lambda: cm.export_merged("a1", tmp_path / "out"),
        lambda: cm.merge("a1"),
    ):
        with pytest.raises(CaptureError, match="interrupted"):
            call()
    cm.load_weights(base.state_dict())
    assert cm.merged == "a1"
    check(cm, base, case, "a1")
