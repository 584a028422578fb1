"""plan and lower for a GPU, on graphs whose values are fake CUDA tensors: kernels, no opaque op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compile_only_gpu import CUDA, compile_only_gpu, on_cuda
from site_graphs import Finished, Holder, SiteGraph
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from lorafx.op_arguments import op_of
from lorafx.passes.fuse import Fuse
from lorafx.passes.lower import Lower
from lorafx.passes.match import Match
from lorafx.passes.plan import Plan

aten = torch.ops.aten
K, N, B, T, VOCAB = 32, 48, 3, 2, 7
ROWS = [0, -1, 2]
KERNEL_CALL = torch.ops.higher_order.triton_kernel_wrapper_functional


def graph_of(path: str) -> tuple[SiteGraph, Finished]:
    """input → the module at `path` with its mark, rows proved."""
    torch.manual_seed(0)
    modules = {"linear": nn.Linear(K, N), "transposed": Conv1D(N, K)}
    modules["embed"] = nn.Embedding(VOCAB, N)
    g = SiteGraph(Holder(**modules), ROWS, lowering="triton", targets=list(modules))
    is_ids = path == "embed"
    x = g.argument(torch.randint(0, VOCAB, (B, T)) if is_ids else torch.randn(B, T, K))
    g.declare(path, bias=not is_ids)
    if is_ids:
        y = g.call(aten.embedding.default, g.weight(path), x)
    elif path == "transposed":
        flat = g.call(aten.view.default, x, [B * T, K])
        y = g.call(aten.addmm.default, g.weight(path, "bias"), flat, g.weight(path))
        y = g.call(aten.view.default, y, [B, T, N])
    else:
        y = g.call(aten.linear.default, x, g.weight(path), g.weight(path, "bias"))
    return g, g.output(g.mark(path, x, y, rows=T))


@pytest.mark.parametrize(
    ("path", "pin", "base"),
    [
        ("linear", "epilogue", []),
        ("linear", "segments", ["addmm.default"]),
        ("transposed", "epilogue", []),
        ("embed", None, ["embedding.default"]),
    ],
)
def test_lora_nodes_become_kernels(path: str, pin: str | None, base: list[str]) -> None:
    g, done = graph_of(path)
    done.run(Match(), Fuse())
    on_cuda(g.mode, done.gm)
    program = done.ctx.program
    if pin is not None:
        program.options = replace(program.options, plan={path: pin})
    with compile_only_gpu():
        assert done.run(Plan(), Lower()) == 1
    calls = [node for node in done.gm.graph.nodes if node.target is KERNEL_CALL]
    assert calls
    for node in done.gm.graph.nodes:
        if node.op == "call_function":
            assert getattr(node.target, "namespace", "") != "lorafx", node.format_node()
            assert node.target is not torch.ops.higher_order.auto_functionalized
    products = [
        n for n in done.targets() if n in ("mm.default", "addmm.default", "embedding.default")
    ]
    assert products == base
    (states,) = done.ctx.states.values()
    assert [state.site.path for state in states] == [path]
    if pin is not None:
        assert states[0].strategy.startswith(pin)
    (output,) = next(n for n in done.gm.graph.nodes if n.op == "output").args[0]
    assert output.meta["val"].shape == (B, T, N)
    assert output.meta["val"].device == CUDA


def test_longer_operands_are_written_before_the_product() -> None:
    """Two kernels, each into a buffer of its own that the product then reads; nothing else of
    lorafx is left."""
    g, done = graph_of("linear")
    done.run(Match(), Fuse())
    on_cuda(g.mode, done.gm)
    done.ctx.program.options = replace(done.ctx.program.options, plan={"linear": "concat"})
    with compile_only_gpu():
        assert done.run(Plan(), Lower()) == 1
    gather, place = (node for node in done.gm.graph.nodes if node.target is KERNEL_CALL)
    assert set(gather.kwargs["tensors_to_clone"]) == {"w_ptr", "flags_ptr"}
    assert place.kwargs["tensors_to_clone"] == ["x_ptr"]
    (flags,) = (n for n in gather.users if n.args[1] == "flags_ptr")
    assert place.kwargs["kwargs"]["flags_ptr"] is flags
    (product,) = (n for n in done.gm.graph.nodes if n.target is aten.addmm.default)
    operands = [_source(item) for item in product.args[1:]]
    assert {(node.args[0], node.args[1]) for node in operands} == {
        (place, "x_ptr"),
        (gather, "w_ptr"),
    }
    assert not any(getattr(op_of(n), "namespace", "") == "lorafx" for n in done.gm.graph.nodes)


def _source(node: fx.Node) -> fx.Node:
    """`node` without permutes and slices."""
    while node.target in (aten.permute.default, aten.slice.Tensor):
        node = node.args[0]
    return node


def test_the_plan_of_a_few_rows_is_a_fused_strategy() -> None:
    """The cost model takes it by itself: 6 rows, 3 slots."""
    g, done = graph_of("linear")
    done.run(Match(), Fuse())
    on_cuda(g.mode, done.gm)
    with compile_only_gpu():
        done.run(Plan(), Lower())
    (states,) = done.ctx.states.values()
    assert states[0].strategy.startswith(("split", "epilogue"))
    assert "modelled" in states[0].strategy
