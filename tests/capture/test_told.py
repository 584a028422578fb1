"""One line a graph in the log: which call it is for, why it is new, where the time went."""

from __future__ import annotations

import logging
import re

import pytest
from dense_merge import Case
from tiny_models import FAMILIES

from lorafx.capture.told import reason

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
        ("0 lora", "the first"),
        ("1 base", "new: without adapters"),
    ]
    serves = r"graph 0 lora of PlainModel serves one request, too; \d+\.\d s \(Dynamo \d+\.\d\)"
    assert re.fullmatch(serves, caplog.records[-1].getMessage())
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


def test_nothing_is_said_by_default(plain: Case, capfd: pytest.CaptureFixture[str]) -> None:
    plain.compile()(**FEED(2, 4), adapter_names=["a0", None])
    assert "graph 0" not in "".join(capfd.readouterr())


@pytest.mark.quick
def test_reasons_name_what_the_nearest_earlier_call_had_not() -> None:
    first = {"requests": "one request", "tokens": "one token each", "mask": "mask of 2 dimensions"}
    second = {"requests": "several requests", "tokens": "one token each"}
    assert reason(first, []) == "the first"
    assert reason(second, [first]) == "new: several requests, no mask"
    assert reason({**first, "tokens": "several tokens each"}, [second, first]) == (
        "new: several tokens each"
    )
    assert "recompiles" in reason(dict(first), [second, first])
