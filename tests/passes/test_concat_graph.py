"""The longer operands in a graph for a GPU: kernels write them in place."""

from __future__ import annotations

import operator
import re

import torch
from compile_only_gpu import CUDA, compile_only_gpu, generated_code
from cuda_graphs import SIZES, SLOTS, Builder, K, spec
from torch import Tensor, fx

from lorafx.kernels.triton.build import build, plan_of
from lorafx.kernels.triton.concat_ops import columns_of
from lorafx.passes.lower.triton_graph import inline_triton_ops

aten = torch.ops.aten
CONCAT_OP = torch.ops.lorafx.triton_concat_.default
N = sum(SIZES)


def graph_of() -> tuple[fx.GraphModule, Builder]:
    """relu(x) beside zeros, W beside zeros → triton_concat_ → product."""
    b = Builder()
    kernel = build(spec(), "concat", rows_hint=4096, device=CUDA)
    assert kernel is not None
    more = columns_of(plan_of(kernel).spec, SLOTS)
    weight = b.input("weight", (N, K))
    x = b.input("x", (b.rows, K))
    x = b.call(aten.relu.default, (x,), b.value(K))
    rows = b.call(aten.sym_size.int, (x, 0), b.rows)

    def value(*shape: object) -> Tensor:
        with b.mode:
            return torch.empty(shape, dtype=torch.bfloat16, device=CUDA)

    def beside(middle: fx.Node, rows: object, count: object) -> fx.Node:
        zeros = b.call(aten.full.default, ([rows, more], 0.0), value(count, more))
        zeros.kwargs = {"dtype": torch.bfloat16, "device": CUDA, "pin_memory": False}
        return b.call(aten.cat.default, ([middle, zeros], 1), value(count, K + more))

    longer_x, longer_w = beside(x, rows, b.rows), beside(weight, N, N)
    names = [argument.name for argument in CONCAT_OP._schema.arguments]
    given = (longer_x, longer_w, *b.bank(), 5, kernel)
    both = b.graph.call_function(
        torch.ops.higher_order.auto_functionalized,
        (CONCAT_OP,),
        dict(zip(names, given, strict=True)),
    )
    values = longer_x.meta["val"], longer_w.meta["val"]
    both.meta["val"] = (None, *values)
    written = [b.call(operator.getitem, (both, i + 1), values[i]) for i in range(2)]
    with b.mode:
        turned = aten.permute.default(written[1].meta["val"], [1, 0])
    right = b.call(aten.permute.default, (written[1], [1, 0]), turned)
    return b.done(b.call(aten.mm.default, (written[0], right), b.value(N))), b


def test_inductor_writes_longer_operands_in_place() -> None:
    with compile_only_gpu():
        gm, b = graph_of()
        inline_triton_ops(gm, [CONCAT_OP])
    gm.graph.lint()
    gm.recompile()
    text = generated_code(gm, b.mode)
    body = text[text.index("def call(") :]
    gather, place = (re.search(rf"{name}_\d+\.run\((.*)\)", body) for name in ("gather", "place"))
    assert gather is not None
    assert place is not None
    products = re.findall(r"extern_kernels\.mm\((.*?), out=", body)
    assert len(products) == 1
    w = gather[1].split(", ")[3]
    x = place[1].split(", ")[0]
    assert products[0].startswith(f"{x}, reinterpret_tensor({w}, ")
    assert gather.start() < place.start() < body.index("extern_kernels.mm(")
    assert "clone" not in body
    assert ".copy_(" not in body
    launches = [line for line in body.splitlines() if ".run(" in line and f"{w}," in line]
    assert len(launches) == 2  # gather, and what writes W into W'
