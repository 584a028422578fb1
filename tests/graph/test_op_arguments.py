"""Calls of ops by the names in their schemas: reading, changing, and one op's call as another's."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from lorafx.graph.context import FUSED_OP, SITE_OP, call_in_place
from lorafx.op_arguments import bound, in_order, op_of, rebind

BANK = ("A", "B", "ranks", "scales", "slots")


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


def inputs(graph: fx.Graph, *names: str) -> dict[str, fx.Node]:
    return {name: graph.placeholder(name) for name in names}


def test_a_call_is_read_and_changed_by_name(graph: fx.Graph) -> None:
    given = inputs(graph, "x", "y", *BANK, "gains")
    node = graph.call_function(SITE_OP, (*list(given.values())[:7], [1], [8], [4], 0))
    assert list(bound(node).items())[:7] == list(given.items())[:7]
    assert bound(node)["siblings"] == [1]
    assert bound(node)["gains"] is None

    rebind(node, rows=3, gains=given["gains"])
    assert node.args[10:] == (3, None, None, given["gains"])
    assert given["gains"].users == {node: None}
    rebind(node, gains=None)  # defaults at the end are left out
    assert node.args[10:] == (3,)
    assert not given["gains"].users


def test_a_name_that_the_op_lacks_and_one_that_is_missing_are_told(graph: fx.Graph) -> None:
    given = inputs(graph, "x", "y", *BANK)
    site = graph.call_function(SITE_OP, (*given.values(), [0], [0], [4], 3))
    with pytest.raises(KeyError, match=r"lorafx\.site\.default takes no row"):
        rebind(site, row=4)
    with pytest.raises(KeyError, match="transposed"):
        in_order(FUSED_OP, bound(site), weight=given["x"], bias=None)


def test_an_op_in_place_is_read_through_its_wrapper(graph: fx.Graph) -> None:
    given = inputs(graph, "y", "x", *BANK)
    op = torch.ops.lorafx.run_delta_.default
    given["y"].meta["val"] = torch.empty(2, 4)
    written = call_in_place(op, (*given.values(), 3, 7))
    wrapper = written.all_input_nodes[0]
    assert op_of(wrapper) is op
    assert bound(wrapper) == {**given, "rows": 3, "kernel": 7}
