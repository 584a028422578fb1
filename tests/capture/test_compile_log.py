"""One line a graph in the log: which call it is for, why it is new, where the time went."""

from __future__ import annotations

import logging
import re
import sys

import pytest
import torch
from dense_merge import Case
from tiny_models import FAMILIES
from torch import Tensor, nn

from lorafx import progress

pytestmark = pytest.mark.any_sizes

FEED = FAMILIES["plain"].inputs
LINE = re.compile(r"graph (\d+ \w+) of PlainModel: (.*); (\d+\.\d) s \((.*)\)")


def test_a_line_a_graph(plain: Case, caplog: pytest.LogCaptureFixture) -> None:
    cm = plain.compile()
    with caplog.at_level(logging.INFO, logger="lorafx"):
        for names in (["a0", None], ["a1", "a0"], [None, None], ["a1"]):
            cm(**FEED(len(names), 4), adapter_names=names)
    found = [LINE.fullmatch(record.getMessage()) for record in caplog.records]
    told = [match.groups() for match in found if match]
    assert [item[:2] for item in told] == [
        ("0 lora", "first call"),
        ("1 base", "new: without adapters"),
        ("2 lora", "new: a batch of one"),
    ]
    for record, (_, _, total, parts) in zip(cm._session.backend.records, told, strict=True):
        assert total == f"{sum(record.seconds.values()):.1f}"
        phases = [part.rpartition(" ")[0] for part in parts.split(", ")]
        assert phases == list(record.seconds)
        assert all(seconds >= 0 for seconds in record.seconds.values())
    assert list(cm._session.backend.records[0].seconds) == [
        "Dynamo",
        "AOTAutograd",
        "passes",
        "reference",
    ]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is long from the start, and nothing has been said of it."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_warned", False)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [item.getMessage() for item in caplog.records if item.levelno == logging.WARNING]


@pytest.mark.slow
def test_long_compiling_is_warned_of_once_in_a_process(
    plain: Case, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        cm = plain.compile()
        cm(**FEED(2, 4), adapter_names=["a0", None])
        cm(**FEED(2, 4))
    assert cm.recompiles == 2
    [text] = warnings(caplog)
    for part in ("lorafx is ", " s so far", "cm.warmup()", 'setLevel("INFO")', 'setLevel("ERROR")'):
        assert part in text
    assert "\n" not in text


def test_a_terminal_has_lines_instead(
    plain: Case,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With all the time that the capture took, tracing included."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cm = plain.compile()
    capsys.readouterr()  # reading of adapters
    cm(**FEED(2, 4), adapter_names=["a0", None])
    shown = capsys.readouterr().err
    assert re.fullmatch(
        r"lorafx: compiling graph 0 lora of PlainModel, first call \.\.\.\n"
        r"lorafx: compiling graph 0 lora of PlainModel, first call: (\d+\.\d) s\n",
        shown,
    )
    seconds = float(shown.rpartition(": ")[2].rpartition(" s")[0])
    assert seconds >= sum(cm._session.backend.records[0].seconds.values()) - 0.1
    assert warnings(caplog) == []


def test_what_nothing_else_tells_names_the_guard(small) -> None:
    case: Case = small(Scaled, ["up"])
    cm = case.compile(options={"lowering": "reference"})
    inputs = {"x": torch.ones(2, 3, 6)}
    cm(**inputs, adapter_names=["a", None])
    cm._orig_mod.scale = 3
    cm(**inputs, adapter_names=["a", None])
    reason = cm.explain().graphs[-1].reason
    assert re.fullmatch(r"new: the guard .*scale.* == 2 failed", reason)


class Scaled(nn.Module):
    """Reads a number that Dynamo guards on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Linear(6, 6), 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.up(x) * self.scale}
