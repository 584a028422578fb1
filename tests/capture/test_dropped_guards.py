"""Which guards of a graph are checked before each call: none on marks, in a model's own frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dense_merge import Case, check_mixed
from tiny_models import token_inputs
from torch._dynamo.guards import CheckFunctionManager

import lorafx

NAMES = ["a1", None, "a3"]


@pytest.mark.slow
def test_a_model_of_another_class_captures_nothing(shallow: Case) -> None:
    """transformers notes the class of each model that is made, in a dictionary that forwards
    read."""
    cm, inputs = shallow.compile(dynamic=False), token_inputs(len(NAMES), 4)

    def graphs() -> int:
        check_mixed(cm, shallow, NAMES, inputs)
        cm(**inputs)
        return cm.recompiles

    class Other(type(shallow.base)):  # type: ignore[misc]
        """Of a name that no model has had."""

    captured = graphs()
    Other(shallow.base.config)
    assert graphs() == captured == 2


def test_what_is_guarded_of_marked_modules(shallow: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as of modules without a hook."""
    made: list[Counter[str]] = []
    build = CheckFunctionManager.build_guards

    def noting(self: Any, guards: Any, *args: Any, **kwargs: Any) -> Any:
        counted = {(guard.create_fn_name(), _text(guard), _attribute(guard)) for guard in guards}
        made.append(Counter(kind for kind, text, _ in counted if "down_proj" in text))
        made[-1]["global"] = sum("hooks_always_called" in text for _, text, _ in counted)
        return build(self, guards, *args, **kwargs)

    monkeypatch.setattr(CheckFunctionManager, "build_guards", noting)
    inputs = token_inputs(len(NAMES), 4)
    with torch.no_grad():
        torch.compile(shallow.model(), backend="eager", dynamic=False)(**inputs)
    shallow.compile(dynamic=False)(**inputs, adapter_names=NAMES)
    base, _, compiled = made  # they are dropped by a filter, behind the first
    assert compiled - base == Counter()


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
