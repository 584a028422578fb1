"""Marks under Dynamo: one graph, nothing baked in, equal to eager."""

from __future__ import annotations

import copy

import pytest
import torch
from marking import ALL, attach, llama
from torch import nn
from torch.fx.experimental import _config as shape_config

from lorafx.errors import MatchError
from lorafx.model.marks import Attachment, detach
from lorafx.model.runtime import Runtime

SLOT = 1


def fill(attachment: Attachment, seed: int = 0) -> None:
    """Random factors at every site, in slot SLOT. What they do in eager mode is in test_marks."""
    torch.manual_seed(seed)
    for group in attachment.groups:
        for factor in (group.bank.A, group.bank.B):
            factor[SLOT] = torch.randn_like(factor[SLOT]) * 0.3
        group.bank.ranks[SLOT] = 4
        group.bank.scales[SLOT] = 0.5


class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.sum()


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, -1)[0]


class Counting:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, inputs):
        self.graphs.append(gm)
        return gm.forward


def test_one_graph_whatever_the_batch_and_the_slots():
    model = llama()
    plain = copy.deepcopy(model)
    attachment = attach(model, ALL)
    runtime = attachment.runtime
    fill(attachment)
    backend = Counting()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad(), shape_config.patch(use_duck_shape=False):
        for rows, length in ((5, 5), (5, 7), (3, 4), (70, 3), (5, 5)):
            ids = torch.randint(0, 50, (rows, length))
            runtime.set_rows([SLOT] * rows)
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        fill(attachment, seed=1)  # another adapter in the same slot
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        Runtime(2, torch.device("cpu"))  # of another model: no guard looks at it
        compiled(ids)
        assert len(backend.graphs) == 1
        runtime.clear()
        assert torch.equal(compiled(ids).logits, plain(ids).logits)
    with_adapters, base = backend.graphs
    nodes = [n for n in with_adapters.graph.nodes if n.op == "call_function"]
    sites = [n for n in nodes if n.target is torch.ops.lorafx.site]
    assert len(sites) == 15
    assert len([n for n in nodes if n.target is torch.ops.lorafx.embedding_site]) == 1
    # Four bank tensors a group and the slots enter as inputs; siblings share theirs.
    for index in range(2, 7):
        assert all(n.args[index].op == "placeholder" for n in sites)
    assert len({n.args[2] for n in sites}) == len(attachment.groups) - 1
    assert len({n.args[6] for n in sites}) == 1
    assert not any("lorafx" in str(n.target) for n in base.graph.nodes)


class Broken(nn.Module):
    """Compiled as a frame of its own in each layer: the layers share one code object."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


def test_layers_and_models_that_share_frames_keep_their_own_factors():
    torch.manual_seed(0)
    models = [nn.Sequential(*(Broken() for _ in range(4))) for _ in range(2)]
    attachments = [attach(model) for model in models]
    backend = Counting()
    x = torch.randn(3, 6)
    for seed, (model, attachment) in enumerate(zip(models, attachments, strict=True)):
        fill(attachment, seed)
        attachment.runtime.set_rows([SLOT] * 3)
        compiled = torch.compile(model, backend=backend, dynamic=True)
        with torch.no_grad():
            base = copy.deepcopy(model)
            assert detach(base) == 8
            assert (model(x) - base(x)).abs().max() > 1e-2
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("module", [Halved(4, 4), Pair(4, 4)], ids=lambda m: type(m).__name__)
def test_a_call_without_place_for_the_delta_in_a_trace(module):
    """Left to the graph passes where there are some, an error where nobody would look."""
    model = nn.Sequential(module)
    attachment = attach(model)
    fill(attachment)
    attachment.runtime.set_rows([SLOT, SLOT])
    x = torch.randn(2, 4)
    backend = Counting()
    torch.compile(model, backend=backend, dynamic=True)(x)
    assert not any(n.target is torch.ops.lorafx.site for n in backend.graphs[0].graph.nodes)
    attachment.runtime.graph_passes = False
    with pytest.raises(MatchError, match="does not fit this call"):
        torch.compile(model, backend="eager", dynamic=True)(x)
