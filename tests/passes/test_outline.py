"""outline on graphs built by hand: layers of one form become calls of one body, others stay."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, SiteGraph
from torch import fx, nn

from lorafx.capture.driver import check_graph
from lorafx.errors import VerifyError
from lorafx.passes.fuse import Fuse
from lorafx.passes.match import Match
from lorafx.passes.outline import Outline
from lorafx.passes.spec import output_values
from lorafx.program.bodies import INVOKE

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, B, LAYERS = 4, 3, 3
ROWS = [0, -1, 2]
OUTLINE = Outline(min_nodes=2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))


class Builder:
    """A stack of layers h + f(W_i h); a test says what f is, and what else each layer does."""

    def __init__(self, layers: int = LAYERS) -> None:
        torch.manual_seed(0)
        self.g = SiteGraph(Layers(layers), ROWS)
        self.count = layers
        self.x = self.g.argument(torch.randn(B, K))
        self.paths = [f"layers.{index}.w" for index in range(layers)]
        self.g.declare(*self.paths)
        self.results: list[fx.Node] = []

    def constant(self, index: int, value: float) -> fx.Node:
        return self.g.constant(f"constant{index}", torch.tensor(value))

    def linear(self, index: int, h: fx.Node) -> fx.Node:
        g, path = self.g, self.paths[index]
        right = g.call(aten.permute.default, g.weight(path), [1, 0])
        y = g.call(aten.addmm.default, g.weight(path, "bias"), h, right)
        return g.mark(path, h, y, rows=1)

    def stack(self, layer) -> Builder:
        """`layer(builder, index, h)` for each layer, its nodes said to be made in that module."""
        h = self.x
        for index in range(self.count):
            before = set(self.g.graph.nodes)
            h = layer(self, index, h)
            for node in self.g.graph.nodes:
                if node not in before:
                    entry = (f"L['self']._modules['layers']._modules['{index}']", Layer)
                    node.meta["nn_module_stack"] = {f"layer{index}": entry}
        self.results.append(h)
        return self

    def finish(self) -> Finished:
        return self.g.output(*self.results)


def plain(b: Builder, index: int, h: fx.Node) -> fx.Node:
    y = b.linear(index, h)
    return b.g.call(aten.add.Tensor, h, b.g.call(aten.relu.default, y))


def calls(done: Finished) -> list[fx.Node]:
    return [node for node in done.gm.graph.nodes if node.target is INVOKE]


def outlined(done: Finished, *passes) -> int:
    """Run the passes; the results are bit for bit what they were."""
    want = done.result()
    edits = done.run(Match(), *passes, OUTLINE)
    for got, expected in zip(done.result(), want, strict=True):
        assert torch.equal(got, expected)
    return edits


def test_the_graph_before_and_after():
    done = Builder(layers=2).stack(plain).finish()
    assert_expected_inline(
        shown(done, OUTLINE, first=(Match(), Fuse())),
        """\
fused_linear = lorafx.fused_linear(x, layers_0_w_weight, layers_0_w_bias, bank, slots, [0],
    [0], [4], 1, False)
relu = aten.relu(fused_linear)
add = aten.add.Tensor(x, relu)
fused_linear_1 = lorafx.fused_linear(add, layers_1_w_weight, layers_1_w_bias, bank_1, slots,
    [0], [0], [4], 1, False)
relu_1 = aten.relu(fused_linear_1)
add_1 = aten.add.Tensor(add, relu_1)
return add_1

outline: 1 edit

invoke_subgraph = invoke_subgraph(outlined_0, 'outlined_0', x, layers_0_w_weight,
    layers_0_w_bias, bank, slots)
getitem = getitem(invoke_subgraph, 0)
invoke_subgraph_1 = invoke_subgraph(outlined_0, 'outlined_0', getitem, layers_1_w_weight,
    layers_1_w_bias, bank_1, slots)
getitem_1 = getitem(invoke_subgraph_1, 0)
return getitem_1
outlined_0:
    fused_linear = lorafx.fused_linear(x, layers_0_w_weight, layers_0_w_bias, bank, slots, [0],
        [0], [4], 1, False)
    relu = aten.relu(fused_linear)
    add = aten.add.Tensor(x, relu)
    return add
""",
    )


@pytest.mark.parametrize("passes", [(), (Fuse(),)], ids=["marks", "fused"])
def test_layers_of_one_form_are_calls_of_one_body(passes):
    done = Builder().stack(plain).finish()
    assert outlined(done, *passes) == 1
    body = done.gm.get_submodule("outlined_0")
    assert [call.args[0].target for call in calls(done)] == ["outlined_0"] * LAYERS
    assert sum(node.op == "call_function" for node in body.graph.nodes) == (3 if passes else 5)
    # What is left outside are the calls and their results.
    assert done.targets() == ["invoke_subgraph", "getitem"] * LAYERS
    (told,) = done.ctx.outlined
    assert told.paths == ("layers.0", "layers.1", "layers.2")
    assert str(told).startswith("layers.0 and 2 more like it as one")


def test_a_lost_call_or_body_node_is_noticed():
    done = Builder().stack(plain).finish()
    outlined(done)
    node = next(iter(done.ctx.states))
    outputs = output_values(done.gm)
    check_graph("outline", done.gm, done.ctx, outputs)
    _, inner = done.ctx.homes[node]
    body = done.gm.get_submodule("outlined_0").graph
    inner.replace_all_uses_with(inner.args[1])
    body.erase_node(inner)
    with pytest.raises(VerifyError, match=r"no site is lost\": layers\.0\.w"):
        check_graph("outline", done.gm, done.ctx, outputs)


def changed(change):
    """The plain layer with `change(b, h, index, last)` on its input."""

    def layer(b: Builder, index: int, h: fx.Node) -> fx.Node:
        return plain(b, index, change(b, h, index, index == LAYERS - 1))

    return layer


OTHER = {
    "a constant": lambda b, h, i, last: b.g.call(
        aten.mul.Tensor, h, b.constant(i, 0.5 if last else 0.25)
    ),
    "a tied weight": lambda b, h, i, last: b.g.call(
        aten.mul.Tensor, h, b.g.weight(b.paths[0 if last else i], "bias")
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_layer_that_differs_is_not_merged(name):
    """The last of three differs in one thing."""
    done = Builder().stack(changed(OTHER[name])).finish()
    outlined(done)
    assert [told.paths for told in done.ctx.outlined] == [("layers.0", "layers.1")]


def test_views_leave_a_body_as_fresh_tensors():
    """Readers outside want a view of an operand and two views of one result: the body returns the
    result once, and the views are taken outside."""

    def layer(b: Builder, index: int, h: fx.Node) -> fx.Node:
        g = b.g
        out = plain(b, index, g.call(aten.sin.default, h))
        b.results.append(g.call(aten.permute.default, h, [1, 0]))
        b.results.extend(g.call(aten.slice.Tensor, out, 1, k, k + 2) for k in range(2))
        return out

    done = Builder().stack(layer).finish()
    assert outlined(done) == 1
    body = done.gm.get_submodule("outlined_0").graph
    (returned,) = body.find_nodes(op="output")[0].args
    assert len(returned) == 1
    assert "slice.Tensor" not in [str(n.target) for n in body.nodes if n.users]


def test_what_the_first_layer_computes_for_all_stands_before_them():
    """A table from integer inputs, made in the first layer, is an operand of all."""
    shared: list[fx.Node] = []

    def layer(b: Builder, index: int, h: fx.Node) -> fx.Node:
        g = b.g
        if not shared:
            places = g.call(aten.arange.default, K, device=torch.device("cpu"))
            shared.append(g.call(aten.mul.Tensor, places, 0.5))
        return plain(b, index, g.call(aten.add.Tensor, h, shared[0]))

    done = Builder().stack(layer).finish()
    assert outlined(done) == 1
    assert len(calls(done)) == LAYERS
    assert done.targets()[:2] == ["arange.default", "mul.Tensor"]


def test_random_numbers_stay_outside():
    """The nodes before and behind them may be merged; they are not, so that each is drawn."""

    def layer(b: Builder, index: int, h: fx.Node) -> fx.Node:
        noise = b.g.call(aten.rand_like.default, h)
        return plain(b, index, b.g.call(aten.add.Tensor, h, b.g.call(aten.mul.Tensor, noise, 0.0)))

    done = Builder().stack(layer).finish()
    assert outlined(done) == 1
    assert done.targets().count("rand_like.default") == LAYERS
