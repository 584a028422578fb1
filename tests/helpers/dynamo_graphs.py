"""What Dynamo made of a model: its graphs, and what it guards.

Two captures of equal models can be compared: numbers that Dynamo takes from addresses, counters and
names of globals are exchanged for the order that they come in.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.hooks import RemovableHandle

from lorafx.capture import replay
from lorafx.capture.backend import Backend

#: Addresses of modules, symbols of sizes, and globals that Dynamo numbers.
_NUMBERED = re.compile(r"\b\d{12,}\b|\b[su]\d+\b|__builtins_dict___\d+|_\d{12,}_c\d+|runtime \d+")


@dataclass
class Captured:
    """By graph, in the order of capture.

    Attributes:
        graphs: of each node its kind, what it calls or how it is reached, its arguments, the
            modules' calls that it was made in, and how its value is laid out.
        guards: kind, source and what else each guard says.
        sizes: what is guarded of sizes, as Python.
        replayed: how many layers were replayed.
    """

    graphs: list[list[str]] = field(default_factory=list)
    guards: list[set[str]] = field(default_factory=list)
    sizes: list[set[str]] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)

    def note(self, gm: fx.GraphModule) -> None:
        seen: dict[str, str] = {}

        def plain(match: re.Match[str]) -> str:
            return seen.setdefault(match.group(), f"<{len(seen)}>")

        nodes = list(gm.graph.nodes)
        places = {node: f"%{place}" for place, node in enumerate(nodes)}
        self.graphs.append([_NUMBERED.sub(plain, _line(node, places)) for node in nodes])
        guards = torch._guards.TracingContext.get().guards_context.dynamo_guards
        self.guards.append({guard_text(guard) for guard in guards})
        running = replay._LOCAL.replay
        self.replayed.append(0 if running is None else running.replayed)


def _line(node: fx.Node, places: dict[fx.Node, str]) -> str:
    called = node.target
    if node.op == "placeholder":
        source = getattr(node.meta.get("grapharg"), "source", None)
        called = node.target if source is None else source.name
    given = fx.map_arg((node.args, node.kwargs), lambda item: places[item])
    stack = node.meta.get("nn_module_stack") or {}
    functions = [function for _, function in node.meta.get("source_fn_stack", ())]
    value = node.meta.get("example_value")
    parts = (node.op, called, given, dict(stack), functions, _layouts(value))
    return "; ".join(map(str, parts))


def _layouts(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    return [_layouts(item) for item in value] if isinstance(value, (list, tuple)) else value


def guard_text(guard: Any) -> str:
    """Kind, source and what else a guard says, without numbers."""
    create, more = guard.create_fn, ""
    if isinstance(create, functools.partial):
        more = str(
            {
                name: getattr(value, "name", value)
                for name, value in create.keywords.items()
                if name != "value"
            }
        )
        create = create.func
    return _NUMBERED.sub("", f"{create.__name__} {guard.name} {more}")


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captured]:
    """What is captured of lorafx's models inside, from Dynamo's and the hooks' beginning."""
    found, compiled, produce = Captured(), Backend.compile, ShapeEnv.produce_guards_verbose

    def noting(self: Backend, gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        found.note(gm)
        return compiled(self, gm, *args, **kwargs)

    def producing(self: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
        made = produce(self, *args, **kwargs)
        found.sizes.append({_NUMBERED.sub("", text) for text in made[0].exprs})
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Backend, "compile", noting)
        patch.setattr(ShapeEnv, "produce_guards_verbose", producing)
        torch._dynamo.reset()
        RemovableHandle.next_id = 0
        yield found


def both_ways(monkeypatch: pytest.MonkeyPatch, run: Callable[[dict[str, Any]], Any]) -> Captured:
    """What is captured with layers replayed: the graphs that are captured without, guards that
    are at least theirs, the same ones on sizes, and the same bits."""
    found: list[Captured] = []
    results: list[Any] = []
    for stamps in (False, True):
        with captured(monkeypatch) as one:
            results.append(run({"stamps": stamps, "lowering": "reference"}))
        found.append(one)
    without, replayed = found
    assert without.graphs == replayed.graphs
    assert without.sizes == replayed.sizes
    for mine, other in zip(without.guards, replayed.guards, strict=True):
        assert mine <= other
    assert without.replayed == [0] * len(without.graphs)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    return replayed
