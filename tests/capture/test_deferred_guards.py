"""Guards on replayed layers, which are made of those that a traced layer keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed
from dynamo_graphs import guard_text
from tiny_models import token_inputs
from torch._dynamo.guards import CheckFunctionManager, GuardBuilder
from torch._dynamo.source import LocalSource
from torch._guards import Guard, GuardsSet, TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.utils.hooks import RemovableHandle

from lorafx.capture.deferred_guards import DeferredGuards, decided_on_traced, defer

NAMES = ["a1", None, "a3"]


def built(
    case: Case, monkeypatch: pytest.MonkeyPatch, dynamic: bool, more: dict[str, Any]
) -> list[set[str]]:
    """What Dynamo builds of the graphs of a mixed batch, but for guards that check nothing."""
    found: list[set[str]] = []
    build = CheckFunctionManager.build_guards

    def noting(self: Any, guards: Any, *args: Any, **kwargs: Any) -> Any:
        texts = map(guard_text, guards)
        found.append({text for text in texts if not text.startswith("EMPTY_NN_MODULE_HOOKS_DICT")})
        return build(self, guards, *args, **kwargs)

    torch._dynamo.reset()
    RemovableHandle.next_id = 0
    with monkeypatch.context() as patch:
        patch.setattr(CheckFunctionManager, "build_guards", noting)
        cm = case.compile({**REFERENCE, **more}, dynamic=dynamic)
        check_mixed(cm, case, NAMES, token_inputs(len(NAMES), 4))
    return found


def active(guards: set[str]) -> set[str]:
    """The one on whether an adapter is active."""
    return {text for text in guards if ".runtime.active" in text}


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_built_is_what_all_traced_layers_keep(
    case_of: Callable[..., Case], dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("llama", num_hidden_layers=3)
    (traced,), (replayed,) = [
        built(case, monkeypatch, dynamic, {"stamps": stamps}) for stamps in (False, True)
    ]
    assert traced <= replayed  # as in `both_ways`
    assert any("down_proj" in text for text in traced if "'2'" in text)
    assert not any("_forward_hooks[" in text for text in replayed - active(replayed))


def test_deferred_guards_are_there_when_they_are_looked_at() -> None:
    """And once."""
    guards, kept, _ = of_two()
    guards.defer(Copied([kept]))
    assert len(guards.inner) == 2
    assert [guard.name for guard in guards][2:] == ["L['kept of another']"]
    assert len(guards) == 3
    guards.defer(Copied([kept]))
    assert len(guards) == 3


@pytest.mark.skipif(
    not hasattr(GuardsSet, "clear"), reason="torch's sets of guards cannot be emptied"
)
def test_a_set_that_is_emptied_forgets_deferred_guards() -> None:
    guards, kept, _ = of_two()
    guards.defer(Copied([kept]))
    guards.clear()
    assert not guards


def test_what_is_dropped_of_a_traced_layer_is_dropped_of_others() -> None:
    """And what was exchanged for another guard before is not."""
    guards, kept, dropped = of_two()
    context = TracingContext(FakeTensorMode())
    context.guards_context.dynamo_guards = guards
    with tracing(context):
        defer(Copied([kept, dropped]))
        guards.inner.discard(kept)
        with decided_on_traced():
            assert [guard.name for guard in guards] == ["L['dropped']"]
            guards.inner.discard(dropped)
    assert [guard.name for guard in guards] == ["L['kept of another']"]


def of_two() -> tuple[DeferredGuards, Guard, Guard]:
    kept, dropped = (LocalSource(name).make_guard(_TYPE) for name in ("kept", "dropped"))
    guards = DeferredGuards(GuardsSet())
    for guard in (kept, dropped):
        guards.add(guard, collect_debug_stack=False)
    return guards, kept, dropped


_TYPE: Any = GuardBuilder.TYPE_MATCH


@dataclass
class Copied:
    """Guards on locals of another name."""

    originals: list[Guard]

    def copied(self, guard: Guard) -> Guard:
        source: Any = guard.originating_source
        made: Guard = LocalSource(f"{source.local_name} of another").make_guard(_TYPE)
        return made
