"""The promises of passes over graphs: a pass that breaks one is named, with the promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from site_graphs import Finished, SiteGraph
from torch import fx, nn

import lorafx
from lorafx.errors import VerifyError
from lorafx.op_arguments import bound, rebind
from lorafx.pass_order import GRAPH_PASSES, UserPass
from lorafx.passes.spec import GRAPH_PROMISES
from lorafx.program import promises
from lorafx.program.context import EXPERT_MARK, ROWS_OF, Context, call_in_place

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, B, T = 4, 3, 2
ORDER = [item.name for item in GRAPH_PASSES]
Break = Callable[[fx.GraphModule, Context], int]


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(K, K), nn.Linear(K, K)


def graph() -> Finished:
    torch.manual_seed(0)
    g = SiteGraph(Siblings(), [0, -1, 2])
    x = g.argument(torch.randn(B, T, K))
    g.declare("q", "k")
    products = {
        path: g.call(aten.linear.default, x, g.weight(path), g.weight(path, "bias"))
        for path in ("q", "k")
    }
    return g.output(*(g.mark(path, x, y) for path, y in products.items()))


def served(ctx: Context) -> fx.Node:
    return next(iter(ctx.states))


def emitted(ctx: Context, before: fx.Node, op: Any, *args: Any) -> fx.Node:
    with ctx.graph.inserting_before(before):
        return ctx.emit(op, *args)


def misplaces(gm: fx.GraphModule, ctx: Context) -> int:
    gm.graph.output_node().append(served(ctx))
    return 1


def forgets_value(gm: fx.GraphModule, ctx: Context) -> int:
    del served(ctx).meta["val"]
    return 1


def reshapes(gm: fx.GraphModule, ctx: Context) -> int:
    output = gm.graph.output_node()
    first, *rest = output.args[0]
    output.args = ((emitted(ctx, output, aten.view.default, first, [-1]), *rest),)
    return 1


def loses(gm: fx.GraphModule, ctx: Context) -> int:
    node = served(ctx)
    node.replace_all_uses_with(bound(node)["y"])
    return 1


def forgets_site(gm: fx.GraphModule, ctx: Context) -> int:
    ctx.states.pop(served(ctx))
    return 1


def multiplies_again(gm: fx.GraphModule, ctx: Context) -> int:
    """x Wᵀ + 0 · y': the op is there, and the result goes past it."""
    node, output = served(ctx), gm.graph.output_node()
    y, nothing = bound(node)["y"], emitted(ctx, output, aten.mul.Tensor, node, 0.0)
    again = emitted(ctx, output, y.target, *y.args)
    output.replace_input_with(node, emitted(ctx, output, aten.add.Tensor, again, nothing))
    return 1


def adds(op: Any, *names: str) -> Break:
    """Puts a call of `op` with these arguments of a site's op in the place of the result."""

    def run(gm: fx.GraphModule, ctx: Context) -> int:
        node, output = served(ctx), gm.graph.output_node()
        values = {**bound(node), "y": node}
        output.replace_input_with(node, emitted(ctx, output, op, *(values[name] for name in names)))
        return 1

    return run


def binds(**values: Any) -> Break:
    """Gives a site's op other arguments; a text is the name of one of its arguments."""

    def run(gm: fx.GraphModule, ctx: Context) -> int:
        node = served(ctx)
        call = bound(node)
        given = {
            name: call.get(item, item) if isinstance(item, str) else item
            for name, item in values.items()
        }
        rebind(node, **given)
        return 1

    return run


def forgets_strategy(gm: fx.GraphModule, ctx: Context) -> int:
    served(ctx).meta.pop("lorafx_strategy")
    return 1


def lowers_nothing(gm: fx.GraphModule, ctx: Context) -> int:
    """As if the graph had been lowered for Inductor."""
    ctx.program.options = replace(ctx.program.options, lowering="inductor")
    return 1


def runs_no_kernel(gm: fx.GraphModule, ctx: Context) -> int:
    call, output = bound(served(ctx)), gm.graph.output_node()
    y = output.all_input_nodes[0]
    names = ("x", "A", "B", "ranks", "scales", "slots")
    with gm.graph.inserting_before(output):
        op = torch.ops.lorafx.run_delta_.default
        written = call_in_place(op, (y, *(call[name] for name in names), 1, 7))
    output.replace_input_with(y, written)
    return 1


#: What breaks each promise, after the pass that made it.
BREAKS: dict[str, Break] = {
    "the graph is well-formed": misplaces,
    "each node has a fake value": forgets_value,
    "the outputs keep their shapes and dtypes": reshapes,
    "no site is lost": loses,
    "each op that adds a delta is a site's": forgets_site,
    "each use of a site's weight has its delta, or is refused": multiplies_again,
    "no mark of experts is left": adds(EXPERT_MARK, "y", "A"),
    "each op that adds a delta has its rows, or refuses mixed batches": binds(rows=0),
    "no mark of rows is left": adds(ROWS_OF, "x", "y"),
    "no op takes an adapter's own rows": binds(own="x"),
    "no op takes scales or biases": binds(gains="x"),
    "a fused op takes its sites' weight": binds(weight="A"),
    "a fused op gives all of its sites' columns": binds(sizes=[K - 1]),
    "the sites of a fused op are siblings, in order": binds(siblings=[1, 0]),
    "each op that adds a delta has a strategy": forgets_strategy,
    "no op is left to lower": lowers_nothing,
    "each op's kernel is loaded": runs_no_kernel,
}


def test_every_promise_is_broken_once() -> None:
    assert list(BREAKS) == [promise.says for promise in GRAPH_PROMISES]
    made = {name for promise in GRAPH_PROMISES for name in (promise.since, promise.until) if name}
    assert made <= set(ORDER)


@pytest.mark.parametrize("promise", GRAPH_PROMISES, ids=lambda promise: promise.says)
def test_the_pass_that_breaks_a_promise_is_named(promise: promises.Promise[Any]) -> None:
    done, since = graph(), promise.since or "match"
    done.run(*GRAPH_PASSES[: ORDER.index(since) + 1])
    mine = UserPass("mine", lorafx.After(since, BREAKS[promise.says]))
    with pytest.raises(VerifyError) as caught:
        done.run(mine)
    made = f"of {promise.since!r}" if promise.since else "of every pass"
    assert str(caught.value).startswith(f"pass 'mine' broke a promise {made}, \"{promise.says}\": ")


def test_a_pass_that_is_off_promises_nothing() -> None:
    done = graph()
    done.run(*(item for item in GRAPH_PASSES if item.name != "provenance"))
    assert all(bound(node)["rows"] == 0 for node in done.ctx.states)


def test_in_service_only_what_always_holds_is_checked(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(promises, "CHECK_ALL", False)
    mine = UserPass("mine", lorafx.After("match", forgets_site))

    def broken(**options: Any) -> Finished:
        done = graph()
        done.ctx.program.options = lorafx.Options(lowering="reference", **options)
        done.run(*GRAPH_PASSES[: ORDER.index("match") + 1], mine)
        return done

    with pytest.raises(VerifyError, match="no site is lost"):
        broken().run(UserPass("other", lorafx.After("mine", loses)))
    for options in ({"verify": "numeric"}, {"dump": str(tmp_path)}):
        with pytest.raises(VerifyError, match="'mine' broke a promise of 'match'"):
            broken(**options)
