"""What Dynamo works out for its logs alone is not worked out where nobody reads them."""

from __future__ import annotations

import collections
import itertools
import logging
import warnings
from typing import Any, NamedTuple

import pytest
import sympy
import torch
from dense_merge import REFERENCE
from sympy.core import relational
from torch import fx, nn
from torch._dynamo import guards, output_graph, side_effects, symbolic_convert
from torch.fx import graph as fx_graph
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from lorafx import size_symbols
from lorafx.compat import capture_settings


class Noting(nn.Module):
    """Its forward leaves a result with its caller, as a model does with the keys of a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        seen["y"] = self.linear(x)
        return seen["y"] + 1


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Dynamo timed, wrote about, looked for the names of, and wrote the code of."""
    done: list[str] = []
    times = guards.profile_guard_manager
    write = side_effects.SideEffects._format_side_effect_message
    name = symbolic_convert.get_funcname
    check_sizes = output_graph.insert_deferred_runtime_asserts

    def timed(*args: Any) -> float:
        done.append("guards")
        return times(*args)

    def written(*args: Any) -> str:
        done.append("side effects")
        return write(*args)

    def named(*args: Any) -> str | None:
        done.append("functions")
        return name(*args)

    def checking(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> None:
        if not isinstance(gm, _LazyGraphModule) or not gm._needs_recompile():
            done.append("code that nobody calls")
        check_sizes(gm, *args, **kwargs)

    monkeypatch.setattr(output_graph, "insert_deferred_runtime_asserts", checking)
    monkeypatch.setattr(guards, "profile_guard_manager", timed)
    monkeypatch.setattr(symbolic_convert, "get_funcname", named)
    monkeypatch.setattr(side_effects.SideEffects, "_format_side_effect_message", written)
    return done


@pytest.mark.parametrize("logged", [False, True])
def test_only_where_it_is_logged(small, worked_out, monkeypatch, logged) -> None:
    policy = torch._dynamo.config.side_effect_replay_policy
    timing, naming = guards.profile_guard_manager, symbolic_convert.get_funcname
    if logged:
        logs = guards.guards_log, side_effects.side_effects_log, output_graph.trace_call_log
        for log in logs:
            monkeypatch.setattr(log, "level", log.level)
            log.setLevel(logging.DEBUG)
    cm = small(Noting, ["linear"]).compile(REFERENCE)
    seen: dict[str, torch.Tensor] = {}
    x = torch.randn(2, 4)
    result = cm(x, seen, adapter_names=["a", "__base__"])
    torch.testing.assert_close(seen["y"] + 1, result, rtol=1e-5, atol=1e-5)
    assert cm.recompiles == 1
    assert set(worked_out) == ({"guards", "side effects", "functions"} if logged else set())
    assert torch._dynamo.config.side_effect_replay_policy == policy
    assert guards.profile_guard_manager is timing
    assert symbolic_convert.get_funcname is naming
    assert output_graph.fx is fx


@pytest.mark.quick
def test_new_sizes_are_compared_as_sympy_does() -> None:
    own, decided = sympy.Symbol.__gt__, []
    decide = sympy.StrictGreaterThan._eval_fuzzy_relation

    def deciding(one: Any, other: Any) -> Any:
        decided.append((one, other))
        return decide(one, other)

    names = itertools.count()
    known: list[dict[str, bool]] = [
        {"integer": True, "positive": True},
        {"integer": True, "positive": True, "even": True},
        {"integer": True},
        {},
    ]
    for assumed, other in itertools.product(known, (0, 1, 2, 1.0, sympy.Symbol("t"))):
        size = sympy.Symbol(f"size{next(names)}", **assumed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sympy.StrictGreaterThan, "_eval_fuzzy_relation", deciding)
            decided.clear()
            with capture_settings(8, unlogged=True):
                got = size > other
        spared = assumed == known[0] and other == 1 and type(other) is int
        assert bool(decided) is not spared
        want = own(size, other)
        assert type(got) is type(want)
        assert got == want
        assert got.args == want.args
    assert sympy.Symbol.__gt__ is own


@pytest.mark.quick
def test_new_sizes_are_equal_to_what_sympy_says(monkeypatch) -> None:
    own, asked = relational.is_eq, []

    def asking(one: Any, other: Any, assumptions: Any = None) -> bool | None:
        asked.append((one, other))
        return own(one, other, assumptions)

    monkeypatch.setattr(size_symbols, "_equal", asking)
    size, another = (sympy.Symbol(name, integer=True, positive=True) for name in ("one", "two"))
    even = sympy.Symbol("three", integer=True, positive=True, even=True)
    number = sympy.Symbol("four", integer=True)
    items = [size, another, even, number, size + 1, 2 * size, sympy.Rational(1, 2), sympy.Float(3)]
    items += map(sympy.Integer, (-1, 0, 1, 2, 7))
    for one, other in itertools.product(items, items):
        want = sympy.Eq(one, other)
        unequal = sympy.Ne(one, other)
        asked.clear()
        with capture_settings(8, unlogged=True):
            assert relational.is_eq is not own
            assert relational.is_eq(one, other) is own(one, other)
            decided = bool(asked)
            got = sympy.Eq(one, other)
            assert sympy.Ne(one, other) == unequal
        positive = other in (1, 2, 7) and isinstance(other, sympy.Integer)
        spared = one in (size, another) and other != one and (other in (size, another) or positive)
        assert decided is not spared
        assert type(got) is type(want)
        assert got == want
    assert relational.is_eq is own


class Own(list):
    """A list that torch's registry of trees does not know."""


class Pair(NamedTuple):
    one: Any
    other: Any


@pytest.mark.quick
@pytest.mark.parametrize(
    "tree",
    [
        ((), {}),
        ((1, None, "one", 2.0, True, torch.float32), {"device": torch.device("cpu")}),
        (immutable_list([1, [2, (3,)]]), immutable_dict({"b": {"d": 1, "c": [2]}, "a": 3})),
        ([Own([1, 2]), Pair(3, [4]), torch.Size([5, 6])], slice(7, 8), torch.ops.aten.mm.default),
        (collections.OrderedDict(b=1, a=[2]), collections.deque([3, (4,)]), {5, 6}),
        7,
    ],
)
def test_leaves_of_arguments_are_those_of_the_registry(tree) -> None:
    with capture_settings(8, unlogged=True):
        got = list(fx_graph.pytree.tree_iter(tree))
        assert fx_graph.pytree.tree_iter is not pytree.tree_iter
        alone = list(fx_graph.pytree.tree_iter(tree, is_leaf=lambda item: item is tree))
    assert fx_graph.pytree is pytree
    assert got == list(pytree.tree_iter(tree))
    assert list(map(type, got)) == list(map(type, pytree.tree_iter(tree)))
    assert alone == [tree]


@pytest.mark.quick
def test_a_size_among_arguments_is_warned_of_as_ever() -> None:
    size = ShapeEnv().create_unbacked_symint()

    def warned(unlogged: bool) -> list[str]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        with capture_settings(8, unlogged=unlogged), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            graph.call_function(torch.ops.aten.view.default, (x, [size, 1]))
        return [str(item.message) for item in found]

    assert warned(True) == warned(False)
