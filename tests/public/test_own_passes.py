"""Passes of the user's own among lorafx's, and what tells of a pass that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed, error
from tiny_models import FAMILIES
from torch import fx

import lorafx
from lorafx import pass_order
from lorafx.errors import VerifyError
from lorafx.op_arguments import bound
from lorafx.program.context import FUSED_OP, SITE_OP, Context

pytestmark = pytest.mark.usefixtures("fixed_sizes")

NAMES = ["a1", None, "a3", "a0"]


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return FAMILIES["plain"].inputs(len(NAMES), 4)


@dataclass(frozen=True)
class Broken:
    """A pass that is as if it were one of lorafx's."""

    name: str
    run: Callable[[fx.GraphModule, Context], int]
    required: bool = False


def doubles(gm: fx.GraphModule, ctx: Context) -> int:
    """Every fused node gives twice its result."""
    for node in gm.graph.find_nodes(op="call_function", target=FUSED_OP):
        with gm.graph.inserting_after(node):
            twice = ctx.call(gm.graph, torch.ops.aten.mul.Tensor, (node, 2.0))
        node.replace_all_uses_with(twice, delete_user_cb=lambda user, own=twice: user is not own)
    return 1


def loses(gm: fx.GraphModule, ctx: Context) -> int:
    """Drops the LoRA of every site that is still a mark."""
    for node in gm.graph.find_nodes(op="call_function", target=SITE_OP):
        node.replace_all_uses_with(bound(node)["y"])
        gm.graph.erase_node(node)
    return 1


def reshapes(gm: fx.GraphModule, ctx: Context) -> int:
    """The graph's output gets another shape."""
    output = gm.graph.output_node()
    (result, *rest) = output.args[0]
    with gm.graph.inserting_before(output):
        flat = ctx.call(gm.graph, torch.ops.aten.view.default, (result, [-1]))
    output.args = ((flat, *rest),)
    return 1


def broken(monkeypatch, after: str, item: Broken) -> None:
    passes = []
    for own in pass_order.GRAPH_PASSES:
        passes += [own, item] if own.name == after else [own]
    monkeypatch.setattr(pass_order, "GRAPH_PASSES", tuple(passes))


def failing(plain: Case, inputs: Any, **options: Any) -> str:
    with pytest.raises(Exception, match="pass") as caught:
        plain.compile(options=options)(**inputs, adapter_names=NAMES)
    found: BaseException | None = caught.value
    while found is not None and not isinstance(found, VerifyError):
        found = found.__cause__ or getattr(found, "inner_exception", None)
    assert found is not None, caught.value
    return str(found)


def test_numeric_verification_names_the_pass_that_broke_it(plain, inputs, monkeypatch):
    broken(monkeypatch, "fuse", Broken("doubles", doubles))
    message = failing(plain, inputs, verify="numeric")
    assert "after pass 'doubles' output 0 differs by" in message
    assert "Options(passes={'doubles': False})" in message


def test_passes_of_the_users_own_run_where_they_are_placed(plain, inputs):
    order: list[str] = []

    def noting(name: str) -> Any:
        def run(gm: fx.GraphModule, ctx: Context) -> int:
            sites = len([node for node in gm.graph.nodes if node.target is SITE_OP])
            order.append(f"{name}, {'sites' if sites else 'no sites'}")
            return 0

        return run

    own = {
        "first": lorafx.After("captured", noting("first")),
        "behind_fuse": lorafx.After("fuse", noting("behind fuse")),
        "last": lorafx.After("behind_fuse", noting("last")),
    }
    cm = plain.compile(options={"passes": {**own, "pack": False}})
    check_mixed(cm, plain, NAMES, inputs)
    assert order == ["first, sites", "behind fuse, no sites", "last, no sites"]
    report = [line.split(":")[0] for line in str(cm.explain()).splitlines()]
    at = [report.index(f"  {name}") for name in ("first", "match", "fuse", "behind_fuse", "last")]
    assert at == sorted(at)
    listed = str(lorafx.pipeline(lorafx.Options(passes={**own, "pack": False})))
    assert "  behind_fuse" in listed
    assert listed.splitlines()[-1] == "  pack          (off)"


def test_what_the_users_own_pass_breaks_is_told(plain, inputs):
    own = {"doubles": lorafx.After("fuse", doubles)}
    message = failing(plain, inputs, verify="numeric", passes=own)
    assert "after pass 'doubles' output 0 differs by" in message
    assert "leave 'doubles' out of Options.passes" in message
    assert "False" not in message, "a pass of the user's own cannot be switched off"
    got = plain.compile(options={"passes": own})(**inputs, adapter_names=NAMES)["logits"]
    assert error(got, plain.expected(NAMES, inputs)) > 1e-2


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ({"mine": lorafx.After("fuze", doubles)}, r"'mine' is placed after 'fuze'.*nearest"),
        ({"fuse": lorafx.After("match", doubles)}, "'fuse' is the name of a pass of lorafx"),
        ({"read": lorafx.After("match", doubles)}, "'read' is the name of a pass of lorafx"),
        (
            {
                "a": lorafx.After("b", doubles),
                "b": lorafx.After("a", doubles),
            },
            "a, b are placed after one another",
        ),
        ({"mine": True}, r"unknown pass 'mine'.*lorafx.After"),
    ],
)
def test_passes_that_have_no_place(plain, passes, told):
    with pytest.raises(lorafx.ConfigError, match=told):
        plain.compile(options={"passes": passes})
    with pytest.raises(lorafx.ConfigError, match=told):
        lorafx.pipeline(lorafx.Options(passes=passes))


def test_a_pass_that_does_not_say_what_it_did(plain, inputs):
    own = {"silent": lorafx.After("match", lambda gm, ctx: None)}
    with pytest.raises(lorafx.ConfigError, match="'silent' returned None; it has to return how"):
        plain.compile(options={"passes": own})(**inputs, adapter_names=NAMES)


def test_a_pass_of_the_users_own_that_raises_is_told(plain, inputs):
    def raises(gm: fx.GraphModule, ctx: Context) -> int:
        raise RuntimeError("not today")

    cm = plain.compile(options={"passes": {"mine": lorafx.After("match", raises)}})
    told = r"the pass 'mine' failed .*not today.*leave 'mine' out of Options\.passes\."
    with pytest.raises(lorafx.CaptureError, match=told):
        cm(**inputs, adapter_names=NAMES)


def test_lint_names_the_pass_that_lost_a_site(plain, inputs, monkeypatch):
    broken(monkeypatch, "provenance", Broken("loses", loses))
    message = failing(plain, inputs)
    assert message.startswith("pass 'loses' lost the LoRA of ")
    assert "gate" in message


def test_lint_names_the_pass_that_changed_an_output(plain, inputs, monkeypatch):
    broken(monkeypatch, "match", Broken("reshapes", reshapes))
    assert "pass 'reshapes' changed the graph's outputs from" in failing(plain, inputs)


@pytest.mark.parametrize("names", [["a1"] * 4, NAMES])
def test_numeric_verification_passes_what_is_right(plain, inputs, names):
    check_mixed(plain.compile(options={"verify": "numeric"}), plain, names, inputs)
