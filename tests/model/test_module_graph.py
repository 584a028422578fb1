"""ModuleGraph: instances, paths, owners and storages against named_modules and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafx.errors import LorafxError
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


def test_canonical_paths_are_those_of_named_modules():
    model = shared_model()
    graph = ModuleGraph(model)
    assert list(graph.modules()) == list(model.named_modules())


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


def test_plain_lists_and_dicts_make_no_paths():
    model = nn.Module()
    model.kept = nn.Linear(2, 2)
    model.plain = [model.kept, nn.Linear(3, 3)]
    model.mapping = {"a": model.kept}
    graph = ModuleGraph(model)
    assert [path for path, _ in graph.modules()] == ["", "kept"]
    assert graph.paths(model.kept) == ("kept",)
    with pytest.raises(LorafxError, match="not part of this Module"):
        graph.paths(model.plain[1])


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


def test_absent_path_names_the_nearest():
    graph = ModuleGraph(shared_model())
    with pytest.raises(LorafxError, match=r"no module 'layers\.1\.upp'.*layers\.1\.up"):
        graph.at("layers.1.upp")
    assert graph.find("layers.1.upp") is None
    assert graph.find("layers.7") is None


def test_owners_by_identity():
    model = shared_model()
    graph = ModuleGraph(model)
    owner = graph.owners(model.layers[1].down.weight)
    assert [(o.path, o.module, o.attribute) for o in owner] == [
        ("layers.1.down", model.layers[1].down, "weight")
    ]
    assert graph.owners(model.first.steps)[0].attribute == "steps"
    assert graph.owners(model.first.up.weight.detach()) == []


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


def test_a_graph_holds_until_something_is_exchanged():
    model = shared_model()
    graph = ModuleGraph(model)
    assert graph.holds
    model.layers[1].down.bias = None
    assert not graph.holds
    graph = ModuleGraph(model)
    model.table["other"] = nn.Linear(4, 4)
    assert not graph.holds


def test_storages_are_read_anew_after_packing():
    model = Block()
    graph = ModuleGraph(model)
    assert graph.tied() == []
    packed = torch.empty(48)
    model.up.weight.data = packed[:24].view(6, 4)
    model.down.weight.data = packed[24:].view(4, 6)
    (owners,) = graph.tied()
    assert [o.path for o in owners] == ["up", "down"]


def test_storages_differ_on_the_meta_device():
    """data_ptr is 0 for all of them there."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert ModuleGraph(model).tied() == []
    model[1].weight = model[0].weight
    assert len(ModuleGraph(model).tied()) == 1
