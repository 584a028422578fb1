"""fold and unfold: of layers that are equal AOTAutograd traces one, and the graph is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, build_case, error
from hand_made import hand_case
from tiny_models import FAMILIES
from torch import Tensor, fx, nn
from torch.library import opcheck

from lorafx import pass_order
from lorafx.capture.compilation import Observer
from lorafx.kernels.ops.layer_ops import LAYER_AGAIN, LAYER_BEGIN, LAYER_END
from lorafx.ownership.flow import plain_path
from lorafx.pass_order import CAPTURED, DYNAMO_PASSES
from lorafx.passes.fold import Fold
from lorafx.passes.unfold import Unfold
from lorafx.program.frame import fake_value
from lorafx.program.isomorphism import stretch_of
from lorafx.torch_internals.graph_parts import tree_leaves

OFF = {"passes": {"fold": False}}
NAMES = ["a0", None, "a1"]
B, T, K = 3, 4, 8


class Layer(nn.Module):
    """h + relu(a h) · b h."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.a, self.b = index, nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return h + torch.relu(self.a(h)) * self.b(h)


class Views(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        heads = self.a(h).view(*h.shape[:2], 2, -1).transpose(1, 2)
        left, right = heads.chunk(2, dim=-1)
        return h + self.b(torch.cat([right, -left], dim=-1).transpose(1, 2).reshape(h.shape))


class InItself(Layer):
    """Writes, but into what it has made."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        y = self.a(h)
        y[..., 0].fill_(2)
        return y.mul_(self.b(h)) + h


class IntoItsInput(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        h.mul_(0.5)
        return self.a(h) + self.b(h)


class IntoAView(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        h.unbind(1)[0].add_(1)
        return self.a(h) + self.b(h)


class IntoAState(Layer):
    """The layers after it read what it writes."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        state.add_(self.a(h)[:, :1])
        return self.b(h) + state


class ItsInput(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return h.add_(self.a(h) * self.b(h))


class Random(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return self.a(h) + self.b(h) + torch.rand_like(h) * 0


class Numbered(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return self.a(h) * (self.index + 1) + self.b(h)


class Model(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(index) for index in range(3))

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        h, state = h * 1, torch.zeros_like(h[:, :1])
        for layer in self.layers:
            h = torch.tanh(layer(h, state))
        return {"logits": h, "state": state}


class Given(Layer):
    """Its `state` is h for the first layer, and an earlier h for the others."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return self.a(h) + self.b(state)

    class Model(Model):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            h = h * 1
            state = h.contiguous()
            for layer in self.layers:
                h, state = torch.tanh(layer(h, state)), h
            return {"logits": h}


class Unused(Layer):
    """The second of three is called for nothing."""

    class Model(Model):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            h = h * 1
            parts = [layer(h, h) for layer in self.layers]
            return {"logits": parts[0] + parts[2]}


class Indexed(Layer):
    """AOTAutograd knows the number in `state`, and writes it into the graph."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return self.a(h) + self.b(h) * h[:, state].unsqueeze(1)

    class Model(Model):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            h = h * 1
            for layer in self.layers:
                h = torch.tanh(layer(h, torch.tensor(layer.index)))
            return {"logits": h}


class Conjugated(Layer):
    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        y = self.a(h) + self.b(h)
        return torch.view_as_complex(y.reshape(*h.shape[:2], -1, 2)).conj()

    class Model(Model):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            h = h * 1
            for layer in self.layers:
                h = torch.tanh(torch.cat([(z := layer(h, h)).real, z.imag], dim=-1))
            return {"logits": h}


class OfAnotherType(Layer):
    """Takes a complex view that does not end in adjacent numbers."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        parts = torch.view_as_real(state.transpose(1, 2)).flatten(-2)
        return self.a(h) + self.b(h) * parts

    class Model(Model):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            h = h * 1
            for layer in self.layers:
                z = torch.view_as_complex(h.reshape(*h.shape[:2], -1, 2)).transpose(1, 2)
                h = torch.tanh(layer(h, z))
            return {"logits": h}


class Shifted(Layer):
    """What follows reads views of its result, which does not begin its memory."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return torch.cat([self.a(h), self.b(h)], dim=-1)[..., 1 : 1 + K]

    class Model(Model):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            h = self.layers[0](h, h).transpose(0, 1)[:3].transpose(0, 1)
            h = self.layers[1](h * 1, h)
            return {"logits": torch.tanh(self.layers[2](h * 1, h).unsqueeze(1)).squeeze(1)}


class InOneBuffer(Layer):
    """Constants of all layers lie in one tensor, in an order of their own."""

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        return self.a(h @ self.u.T) + self.b(h @ self.v.T)

    class Model(Model):
        def __init__(self, kind: type[Layer]) -> None:
            super().__init__(kind)
            parts = torch.randn(6, K, K)
            for layer, (u, v) in zip(self.layers, [(0, 4), (3, 1), (5, 2)], strict=True):
                layer.register_buffer("u", parts[u])
                layer.register_buffer("v", parts[v])


class Seen(Observer):
    """The captured graphs: what each node calls, on which others, in which modules' calls, from
    which lines, and what it gives in which memory. Sizes are left out: without the passes those of
    each layer's cache are counted by themselves."""

    def __init__(self) -> None:
        self.graphs: list[list[Any]] = []
        self.forms: list[Any] = []

    def after(self, gm: fx.GraphModule, ctx: Any, done: Any) -> None:
        if done == CAPTURED:
            nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
            sizes = {node for node in nodes if isinstance(fake_value(node), torch.SymInt)}
            number = dict.fromkeys(sizes, "size")
            graph, memory = list[Any](), dict[int, int]()
            for node in gm.graph.nodes:
                calls = (node.meta.get("nn_module_stack") or {}).values()
                arguments = str(fx.node.map_arg((node.args, node.kwargs), number.__getitem__))
                if number.setdefault(node, f"n{len(graph)}") != "size":
                    paths = [plain_path(path) for path, _ in calls]
                    lines = node.op == "placeholder" or node.meta.get("stack_trace")
                    graph.append((node.target, arguments, paths, lines, places(node, memory)))
            self.graphs.append(graph)
            self.forms.append(stretch_of(gm, nodes).form)


def places(node: fx.Node, memory: dict[int, int]) -> list[Any]:
    """The number of the memory of each tensor that a node gives, and where it begins in it."""
    leaves = [] if node.op == "output" else tree_leaves(fake_value(node))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [
        (memory.setdefault(item.untyped_storage()._cdata, len(memory)), str(item.storage_offset()))
        for item in tensors
    ]


def edits(cm: Any, name: str) -> list[int]:
    records = cm._session.backend.records
    return [done.edits for record in records for done in record.passes if done.name == name]


def seen(case: Case, run: Any, options: dict[str, Any]) -> tuple[Any, Seen]:
    torch._dynamo.reset()
    cm, graphs = case.compile({**REFERENCE, **options}), Seen()
    with cm._session.backend.observed_by(graphs):
        run(cm)
    return cm, graphs


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a few nodes are folded, too."""
    passes = (*DYNAMO_PASSES[:-1], Fold(min_nodes=5))
    monkeypatch.setattr(pass_order, "DYNAMO_PASSES", passes)


@pytest.mark.parametrize(
    ("kind", "folded", "unfolded"),
    [
        (Layer, 1, 3),
        (Views, 1, 3),
        (InItself, 1, 3),
        (Random, 1, 3),
        (IntoItsInput, 1, 0),
        (IntoAView, 1, 0),
        (IntoAState, 1, 0),
        (Given, 1, 0),
        (Unused, 1, 2),
        (Indexed, 0, 0),
        (Conjugated, 0, 0),
        (OfAnotherType, 1, 3),
        (Shifted, 1, 2),
        (InOneBuffer, 1, 3),
        (ItsInput, 0, 0),
        (Numbered, 0, 0),
    ],
)
def test_the_graph_is_the_one_without_it(
    kind: type[Layer], folded: int, unfolded: int, short: None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    paths = [f"layers.{index}.{name}" for index in range(3) for name in "ab"]
    case, h = (
        hand_case(getattr(kind, "Model", Model)(kind), tmp_path, a0=paths, a1=paths),
        torch.randn(B, T, K),
    )
    got: list[Any] = []

    def run(cm: Any) -> None:
        got.append(cm(h=h, adapter_names=NAMES)["logits"])
        assert error(got[-1], case.expected(NAMES, {"h": h})) <= TOLERANCE

    cm, graphs = seen(case, run, {})
    assert (edits(cm, "fold"), edits(cm, "unfold")) == ([folded], [unfolded])
    off, whole = seen(case, run, OFF)
    assert edits(off, "unfold") == [0]
    for got_graph, want in zip(graphs.graphs, whole.graphs, strict=True):
        for node, expected in zip(got_graph, want, strict=True):
            assert node == expected
    assert graphs.forms == whole.forms
    assert torch.equal(*got)


@pytest.mark.any_sizes
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_models_have_the_graphs_without_it(family: str, tmp_path: Path) -> None:
    """Of a prompt and of a step, whose caches have sizes of their own in each layer."""
    torch.manual_seed(0)
    case, tokens = build_case(family, tmp_path, num_hidden_layers=3), list[Tensor]()
    inputs = FAMILIES[family].inputs(3, 5)

    def run(cm: Any) -> None:
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens.append(cm.generate(**inputs, adapter_names=NAMES, **settings))

    cm, graphs = seen(case, run, {})
    assert edits(cm, "unfold") == [3, 3]
    _, whole = seen(case, run, OFF)
    for got_graph, want in zip(graphs.graphs, whole.graphs, strict=True):
        for node, expected in zip(got_graph, want, strict=True):
            assert node == expected
    assert len(whole.graphs) == 2
    assert graphs.forms[0] == whole.forms[0]
    assert torch.equal(*tokens)


def test_where_it_fails_the_whole_graph_is_traced(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    paths = [f"layers.{index}.{name}" for index in range(3) for name in "ab"]
    case = hand_case(Model(Layer), tmp_path, a0=paths, a1=paths)
    h, tries = torch.randn(B, T, K), list[int]()

    def fails(self: Unfold, gm: fx.GraphModule, ctx: Any) -> int:
        tries.append(len(ctx.frame.folded))
        if ctx.frame.folded:
            raise RuntimeError("not today")
        return 0

    monkeypatch.setattr(Unfold, "run", fails)
    cm = case.compile(REFERENCE)
    got = cm(h=h, adapter_names=NAMES)["logits"]
    assert error(got, case.expected(NAMES, {"h": h})) <= TOLERANCE
    assert tries == [1, 0]


def test_opcheck() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 5)[:, ::2]
    opcheck(LAYER_BEGIN, (x, [x, w], 0))
    opcheck(LAYER_END, ([x, w.T], [x], 0))
    opcheck(LAYER_AGAIN, ([w], [x, w.T], 0, 0))


def test_what_the_ops_give() -> None:
    """Tensors of their own: what is returned is never what was taken."""
    x, w = torch.randn(2, 3), torch.randn(4, 5)[:, ::2]
    begun, (ended,) = LAYER_BEGIN(x, [x, w], 0), LAYER_END([w], [x], 0)
    assert torch.equal(begun, x)
    assert begun.data_ptr() != x.data_ptr()
    assert torch.equal(ended, w)
    assert ended.stride() == w.stride()
    (again,) = LAYER_AGAIN([x], [w], 0, 0)
    assert again.stride() == w.stride()
    assert not again.any()
