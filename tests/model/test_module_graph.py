"""Paths to a module that many modules share are bounded."""

from __future__ import annotations

import pytest
from torch import nn

from lorafx.model.module_graph import MAX_PATHS, ModuleGraph

pytestmark = pytest.mark.quick


def test_paths_are_bounded_and_at_knows_them_all():
    """Ten levels, each holding the next twice: 1024 paths to the leaf."""
    leaf = nn.Linear(2, 2)
    model: nn.Module = leaf
    for _ in range(10):
        holder = nn.Module()
        holder.left = holder.right = model
        model = holder
    graph = ModuleGraph(model)
    paths = graph.paths(leaf)
    assert len(paths) == len(set(paths)) == MAX_PATHS
    assert paths[0] == ".".join(["left"] * 10)
    last = ".".join(["right"] * 10)
    assert last not in paths
    assert graph.at(last) is leaf
    assert len(graph.paths(leaf, limit=2000)) == 1024
