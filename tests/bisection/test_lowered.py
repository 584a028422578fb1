"""`lorafx.bisect` finds where what Inductor makes of right graphs is wrong. The fault is planted in
Inductor: one of its own passes makes a product twice what it is."""

from __future__ import annotations

import pytest
import torch
from dense_merge import save_adapter
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import lorafx
from lorafx.kernels.cpu.dense import DENSE_ADDMM_DELTA

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.first(x))))


class Twice(CustomGraphPass):
    """The product of `up`, whose results are 10 wide."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is DENSE_ADDMM_DELTA and node.meta["val"].shape[-1] == 10:
                with graph.inserting_after(node):
                    twice = graph.call_function(aten.mul.Tensor, (node, 2.0))
                twice.meta.update(node.meta)
                node.replace_all_uses_with(twice)
                twice.args = (node, 2.0)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> lorafx.CompiledModel:
    torch.manual_seed(0)
    model, folder = Net().eval(), tmp_path_factory.mktemp("adapters")
    folders = {
        name: save_adapter(model, folder / name, rank=2, targets="all-linear", seed=seed)
        for seed, name in enumerate(("a", "b"))
    }
    return lorafx.compile(model, folders, options={"lowering": "inductor"})


X, NAMES = {"x": torch.randn(3, 6)}, ["a", None, "b"]


def test_a_wrong_product_is_found(compiled: lorafx.CompiledModel) -> None:
    torch._dynamo.reset()
    with config.patch(post_grad_custom_pre_pass=Twice()):
        found = lorafx.bisect(compiled, X, NAMES)
    assert found.first == "lowering (inductor)"
    assert found.served > found.tolerance
    assert all(stage.error <= found.tolerance for stage in found.stages)
    assert found.site is None
    assert "Options(plan={path: 'aten'})" in str(found)
