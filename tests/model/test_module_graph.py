"""ModuleGraph: instances, paths, owners and storages against named_modules and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafx.model.module_graph import MAX_PATHS, ModuleGraph

pytestmark = pytest.mark.quick


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(1))


def shared_model() -> nn.Module:
    """One block under a ModuleList twice, under a ModuleDict, and as an attribute."""
    model = nn.Module()
    block = Block()
    model.first = block
    model.layers = nn.ModuleList([block, Block(), block])
    model.table = nn.ModuleDict({"again": block, "other": nn.Linear(4, 4)})
    return model


def test_one_instance_has_every_path():
    model = shared_model()
    graph = ModuleGraph(model)
    block = model.first
    assert graph.paths(block) == ("first", "layers.0", "layers.2", "table.again")
    assert graph.paths(block.up)[0] == "first.up"
    assert set(graph.paths(block.up)) == {f"{p}.up" for p in graph.paths(block)}
    for path in graph.paths(block.up):
        assert graph.at(path) is block.up
    assert graph.tied() == []


def test_paths_do_not_go_round_a_cycle_below_the_root():
    model = nn.Module()
    model.a = nn.Module()
    model.a.b = nn.Module()
    model.a.b.back = model.a
    model.a.b.linear = nn.Linear(2, 2)
    model.a.root = model
    graph = ModuleGraph(model)
    assert graph.paths(model) == ("",)
    assert graph.at("a.root.a") is model.a
    assert graph.paths(model.a) == ("a",)
    assert graph.paths(model.a.b.linear) == ("a.b.linear",)


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


def test_tied_parameter_and_shared_storage():
    model = nn.Module()
    model.embed = nn.Embedding(10, 4)
    model.head = nn.Linear(4, 10, bias=False)
    model.head.weight = model.embed.weight
    model.alone = nn.Linear(4, 4)
    graph = ModuleGraph(model)
    tied = [("embed", "weight"), ("head", "weight")]
    assert [(o.path, o.attribute) for o in graph.owners(model.embed.weight)] == tied
    assert [[(o.path, o.attribute) for o in owners] for owners in graph.tied()] == [tied]
    alone = [model.alone.weight, model.alone.bias]
    assert graph.alone() == {id(parameter) for parameter in alone}
    model.view = model.alone.weight.detach()[1:]
    assert graph.alone() == {id(model.alone.bias)}
