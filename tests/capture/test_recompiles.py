"""Graphs: captured once for every mix, adapter, batch size and length, and never shared wrongly."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from dense_merge import REFERENCE, Case, check_mixed, error
from tiny_models import FAMILIES, token_inputs
from torch import nn
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.utils import counters
from transformers.utils.logging import get_logger

from lorafx.errors import CaptureError

pytestmark = pytest.mark.any_sizes


def frames() -> int:
    """Frames that Dynamo has compiled in this process."""
    return counters["frames"]["ok"]


def test_twenty_mixes_and_a_swap_on_one_graph(llama):
    cm = llama.compile()
    draw = random.Random(0)
    torch.manual_seed(0)
    check_mixed(cm, llama, ["a0", None, "a1", "a2"], token_inputs(4, 6))
    captured, seen, mixes = cm.recompiles, frames(), set()
    while len(mixes) < 20:
        names = tuple(draw.choice([None, "a0", "a1", "a2", "a3", "a4"]) for _ in range(4))
        if any(names):
            mixes.add(names)
            inputs = token_inputs(4, draw.randrange(2, 12))
            if len(mixes) % 5 == 0:
                check_mixed(cm, llama, names, inputs)
            else:
                cm(**inputs, adapter_names=names)
    cm.unload_adapter("a2")
    cm.load_adapter(llama.folders["a4"], "a2")  # another adapter under a known name
    inputs = token_inputs(4, 5)
    want = llama.expected(["a4", "a0", None, "a4"], inputs)
    got = cm(**inputs, adapter_names=["a2", "a0", None, "a4"]).logits
    assert error(got, want) <= 1e-5
    check_mixed(cm, llama, ["a3", "a1", "a0"], token_inputs(3, 7))
    assert (cm.recompiles, frames()) == (captured, seen)


def test_batch_as_long_as_the_sequence_is_no_common_symbol(plain):
    """(5, 5) then (5, 7): with duck shaping batch and length would be one symbol."""
    torch.manual_seed(0)
    cm, feed = plain.compile(), FAMILIES["plain"].inputs
    names = ["a0", None, "a1", "a3", "a2"]
    check_mixed(cm, plain, names, feed(5, 5))
    check_mixed(cm, plain, names, feed(5, 7))
    check_mixed(cm, plain, names[:4], feed(4, 5))
    assert cm.recompiles == 1
    assert torch.fx.experimental._config.use_duck_shape  # the user's own setting is back


def test_the_recompile_limit_is_an_error_not_silent_eager(plain):
    cm = plain.compile(options={"recompile_limit": 1}, dynamic=False)
    feed = FAMILIES["plain"].inputs
    torch.manual_seed(0)
    check_mixed(cm, plain, ["a0", "a1"], feed(2, 3))
    with pytest.raises(CaptureError, match=r"PlainModel has 1 graphs.*recompile_limit"):
        cm(**feed(3, 4), adapter_names=["a0", "a1", None])
    check_mixed(cm, plain, ["a0", "a1"], feed(2, 3))


def _text(guard: Any) -> str:
    return str(guard.name() if callable(guard.name) else guard.name)


@pytest.mark.slow
def test_no_guard_on_marks_is_checked(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model's own frame. Dynamo makes all guards before they are chosen."""
    names = ["a1", None, "a3"]
    made: list[list[str]] = []
    build = CheckFunctionManager.build_guards

    def noting(self: Any, guards: Any, *args: Any, **kwargs: Any) -> Any:
        made.append([text for text in map(_text, guards) if ".runtime" in text])
        return build(self, guards, *args, **kwargs)

    monkeypatch.setattr(CheckFunctionManager, "build_guards", noting)
    cm: Any = llama.compile({"cache": str(tmp_path / "graphs")}, dynamic=False)
    inputs = token_inputs(len(names), 4)
    check_mixed(cm, llama, names, inputs)
    *before, last = made
    assert not last
    assert [len(guards) > 1 for guards in before] == [True]
    check_mixed(cm, llama, [None] * len(names), inputs)  # by code of the base's own
    check_mixed(cm, llama, names, inputs)
    assert cm.recompiles == 2


#: `warning_once` is a method that transformers gives all loggers.
LOG = get_logger("transformers.tests")


class Warns(nn.Module):
    """Its forward gives a warning, once or each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, each: bool = False) -> torch.Tensor:
        x = x + 1
        if each:
            LOG.warning("each time")
        else:
            LOG.warning_once("once")
        return self.linear(x)


@pytest.mark.one_road  # it counts messages
def test_a_message_that_is_logged_once_breaks_no_graph(small, monkeypatch):
    """Rows stay proved behind it."""
    cm = small(Warns, ["linear"]).compile(REFERENCE)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.msg)  # type: ignore[method-assign]
    monkeypatch.setattr(LOG, "handlers", [handler])
    x, mixed = torch.randn(2, 4), {"adapter_names": ["a", None]}
    for _ in range(2):
        cm(x, **mixed)
    assert (said, cm.recompiles) == (["once"], 1)
    for _ in range(2):
        cm(x, each=True, **mixed)
    assert said == ["once", "each time", "each time"]
