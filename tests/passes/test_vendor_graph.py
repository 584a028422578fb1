"""The longer operands in a graph for a GPU: kernels write them in place, in W's own buffer too."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from compile_only_gpu import CUDA, compile_only_gpu, generated_code
from cuda_graphs import SIZES, SLOTS, Builder, K, spec
from torch import Tensor, fx

from lorafx.kernels.triton.concat_launch import layout_of
from lorafx.kernels.triton.triton_build import build, plan_of
from lorafx.passes.lower.triton_graph import inline_triton_ops

aten = torch.ops.aten
CONCAT_OP = torch.ops.lorafx.triton_concat_.default
N = sum(SIZES)


def graph_of(*, room: bool) -> tuple[fx.GraphModule, Builder]:
    """relu(x) beside zeros, W' an input or W beside zeros → triton_concat_ → products."""
    b = Builder()
    kernel = build(spec(), "concat_apart", rows_hint=4096, device=CUDA)
    assert kernel is not None
    layout = layout_of(plan_of(kernel).spec)
    left, right = layout.columns(SLOTS)
    long = left + K + right
    wide = b.input("wide", (N, long)) if room else b.input("weight", (N, K))
    x = b.input("x", (b.rows, K))
    x = b.call(aten.relu.default, (x,), b.value(K))
    rows = b.call(aten.sym_size.int, (x, 0), b.rows)

    def value(*shape: object) -> Tensor:
        with b.mode:
            return torch.empty(shape, dtype=torch.bfloat16, device=CUDA)

    def beside(middle: fx.Node, rows: object, count: object) -> fx.Node:
        parts = [middle]
        for place, columns in ((0, left), (2, right)):
            zeros = b.call(aten.full.default, ([rows, columns], 0.0), value(count, columns))
            zeros.kwargs = {"dtype": torch.bfloat16, "device": CUDA, "pin_memory": False}
            parts.insert(place, zeros)
        return b.call(aten.cat.default, (parts, 1), value(count, long))

    def cut(node: fx.Node, dim: int, start: int, end: int) -> fx.Node:
        with b.mode:
            part = aten.slice.Tensor(node.meta["val"], dim, start, end)
        return b.call(aten.slice.Tensor, (node, dim, start, end), part)

    longer_x = beside(x, rows, b.rows)
    longer_w = wide if room else beside(wide, N, N)
    names = [argument.name for argument in CONCAT_OP._schema.arguments]
    given = (longer_x, longer_w, *b.bank(), 5, left, 0, kernel)
    both = b.graph.call_function(
        torch.ops.higher_order.auto_functionalized,
        (CONCAT_OP,),
        dict(zip(names, given, strict=True)),
    )
    values = longer_x.meta["val"], longer_w.meta["val"]
    both.meta["val"] = (None, *values)
    written = [b.call(operator.getitem, (both, i + 1), values[i]) for i in range(2)]
    if room:
        b.call(aten.copy_.default, (wide, written[1]), values[1])
    parts, start = [], 0
    for place, size in zip(layout.places, SIZES, strict=True):
        span = layout.span(place, SLOTS)
        x_part = cut(written[0], 1, *span)
        w_part = cut(cut(written[1], 0, start, start + size), 1, *span)
        with b.mode:
            turned = aten.permute.default(w_part.meta["val"], [1, 0])
        w_part = b.call(aten.permute.default, (w_part, [1, 0]), turned)
        parts.append(b.call(aten.mm.default, (x_part, w_part), b.value(size)))
        start += size
    return b.done(b.call(aten.cat.default, (parts, 1), b.value(N))), b


@pytest.mark.parametrize("room", [True, False])
def test_inductor_writes_longer_operands_in_place(room: bool) -> None:
    with compile_only_gpu():
        gm, b = graph_of(room=room)
        inline_triton_ops(gm, [CONCAT_OP])
    gm.graph.lint()
    gm.recompile()
    text = generated_code(gm, b.mode)
    body = text[text.index("def call(") :]
    gather, place = (re.search(rf"{name}_\d+\.run\((.*)\)", body) for name in ("gather", "place"))
    assert gather is not None
    assert place is not None
    products = re.findall(r"extern_kernels\.mm\((.*?), out=", body)
    assert len(products) == len(SIZES)
    w = gather[1].split(", ")[3]
    x = place[1].split(", ")[0]
    assert w.startswith("wide") == room
    for product in products:
        assert f"reinterpret_tensor({x}, " in product
        assert f"reinterpret_tensor({w}, " in product
    assert gather.start() < place.start() < body.index("extern_kernels.mm(")
    assert "clone" not in body
    assert ".copy_(" not in body
    launches = [line for line in body.splitlines() if ".run(" in line and f"{w}," in line]
    assert len(launches) == (1 if room else 2)  # gather, and what writes W into a new W'
