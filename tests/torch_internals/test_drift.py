"""Under a torch that is another one, lorafx is right or refuses: for every private name that it
uses, missing, or a function of another signature (`tests/helpers/drift.py`).

In `make test` a sample: one name for each way, of those that every call needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drift
import pytest
import torch

import lorafx

Case = dict[str, str]


def every_case() -> list[Case]:
    return [
        {"name": name, "way": way, "road": road}
        for name, modules in drift.names().items()
        for road in sorted({drift.ROADS.get(module, "call") for module in modules})
        for way in drift.WAYS
        if drift.applies(name, way)
    ]


def verdicts(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """What became of each case, each in a process of its own."""
    started = subprocess.run(
        [sys.executable, drift.__file__, str(folder)],
        input=json.dumps(list(cases)),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
        check=False,
    )
    found = [json.loads(line) for line in started.stdout.splitlines()]
    assert len(found) == len(cases), started.stderr
    return found


def _path() -> str:
    """So that the child finds the lorafx that this process has, and the helpers."""
    own = (str(Path(lorafx.__file__).parents[1]), str(Path(drift.__file__).parent))
    others = os.environ.get("PYTHONPATH")
    return os.pathsep.join((*own, others) if others else own)


def check(cases: Sequence[Case], folder: Path) -> None:
    found = verdicts(cases, folder)
    counts = Counter((case["way"], case["verdict"]) for case in found)
    for way in drift.WAYS:
        told = ", ".join(f"{counts[way, v]} {v}" for v in ("right", "refused", "raw", "wrong"))
        print(f"{way}: {told}")
    bad = [case for case in found if case["verdict"] not in ("right", "refused")]
    assert not bad, "\n".join(
        f"{case['name']} ({case['way']}): {case['verdict']}: {case['text']}" for case in bad
    )


@pytest.mark.slow
def test_a_name_that_every_call_needs(tmp_path: Path) -> None:
    name = "torch._C._functorch.peek_interpreter_stack"
    found = verdicts([{"name": name, "way": way, "road": "call"} for way in drift.WAYS], tmp_path)
    assert [case["verdict"] for case in found] == ["refused", "refused"]
    assert f"torch {torch.__version__.partition('+')[0]}" in found[0]["text"]


@pytest.mark.slow
def test_every_name(tmp_path: Path) -> None:
    check(every_case(), tmp_path)
