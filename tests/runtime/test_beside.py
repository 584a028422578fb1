"""Calls are answered eagerly at once, while processes beside compile their graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dense_merge import TOLERANCE, Case, check_mixed, error
from tiny_models import plain_inputs
from torch._dynamo.utils import counters

from lorafx.torch_internals.versions import saves_graphs

pytestmark = pytest.mark.skipif(not saves_graphs(), reason="torch cannot save graphs")

SECONDS = 120.0
NAMES = ["a0"] * 3


def started(case: Case, **options: Any) -> Any:
    """The case's model, compiled with a tier that answers at once."""
    return case.compile({"start": "eager", "cache": None, **options})


def served(cm: Any, case: Case, inputs: dict[str, Any], names: list[Any] = NAMES) -> None:
    """A call is right."""
    got = cm(**inputs, adapter_names=names)["logits"]
    assert error(got, case.expected(names, inputs)) <= TOLERANCE


def tiers(cm: Any) -> list[str]:
    return [kind.tier for kind in cm.status().kinds]


def processes(cm: Any) -> list[int]:
    return [process.pid for process in cm._session.tiers._processes]


def running(pid: int) -> bool:
    """Whether a process runs, or has ended and nobody has waited for it."""
    return Path(f"/proc/{pid}").exists()


def traced() -> int:
    """How many graphs Dynamo has traced in this process."""
    count: int = counters["stats"]["unique_graphs"]
    return count


def test_first_calls_are_eager_and_later_ones_take_the_graph(plain: Case) -> None:
    before = traced()
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    assert tiers(cm) == ["eager"]
    assert processes(cm) == []
    packs = cm._session.program.pack_watch
    assert not packs.intact
    served(cm, plain, inputs)
    assert tiers(cm) == ["compiling"]
    assert packs.intact  # which the process has too
    assert cm.recompiles == 0
    (pid,) = processes(cm)
    assert cm.wait(SECONDS)
    assert not running(pid)
    served(cm, plain, inputs)
    assert tiers(cm) == ["ready"]
    assert cm.recompiles == 1
    served(cm, plain, plain_inputs(5, 2), ["a1"] * 5)  # other sizes and adapters
    check_mixed(cm, plain, ["a0", None, "a1"], inputs)
    assert tiers(cm) == ["ready"]
    assert cm.recompiles == 1
    assert traced() == before
