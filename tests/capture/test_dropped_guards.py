"""Which guards of a graph are checked before each call: none on marks, in a model's own frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dense_merge import Case, check_mixed
from tiny_models import token_inputs
from torch._dynamo.guards import CheckFunctionManager

NAMES = ["a1", None, "a3"]


def _text(guard: Any) -> str:
    return str(guard.name() if callable(guard.name) else guard.name)


def test_no_guard_on_marks_is_checked(
    shallow: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo makes all guards before they are chosen."""
    made: list[list[str]] = []
    build = CheckFunctionManager.build_guards

    def noting(self: Any, guards: Any, *args: Any, **kwargs: Any) -> Any:
        made.append([text for text in map(_text, guards) if ".runtime" in text])
        return build(self, guards, *args, **kwargs)

    monkeypatch.setattr(CheckFunctionManager, "build_guards", noting)
    cm: Any = shallow.compile({"cache": str(tmp_path / "graphs")}, dynamic=False)
    inputs = token_inputs(len(NAMES), 4)
    check_mixed(cm, shallow, NAMES, inputs)
    *before, last = made
    assert not last
    assert [len(guards) > 1 for guards in before] == [True]
    check_mixed(cm, shallow, [None] * len(NAMES), inputs)  # by code of the base's own
    check_mixed(cm, shallow, NAMES, inputs)
    assert cm.recompiles == 2
