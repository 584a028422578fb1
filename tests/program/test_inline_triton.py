"""Triton ops in a lowered graph become their kernels: on fake CUDA tensors, no GPU needed."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from compile_only_gpu import CUDA, compile_only_gpu, generated_code
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from lorafx.errors import LoweringError
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.build import TritonSpec, build, plan_of
from lorafx.program.inline_triton import inline_triton_ops

K, SIZES, RANK, SLOTS = 256, (192, 64), 16, 4


class Builder:
    """A graph over fake CUDA tensors, as `lower` leaves it; the rows M are a symbol."""

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.graph = fx.Graph()
        symbol = self.env.create_symbol(37, ConstantSource("M"), dynamic_dim=DimDynamic.DYNAMIC)
        self.rows = self.env.create_symintnode(symbol, hint=37)

    def input(self, name: str, shape: tuple, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
        node = self.graph.placeholder(f"{name}_{len(self.graph.nodes)}")
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=CUDA)
        return node

    def bank(self, *, embedding: bool = False) -> tuple[fx.Node, ...]:
        group = 1 if embedding else len(SIZES)
        a_shape = (SLOTS, 1000, RANK) if embedding else (SLOTS, RANK, group * K)
        columns = K if embedding else sum(SIZES)
        return (
            self.input("A", a_shape),
            self.input("B", (SLOTS, RANK, columns)),
            self.input("ranks", (SLOTS, group), torch.int32),
            self.input("scales", (SLOTS, group), torch.float32),
            self.input("slots", (8,), torch.int32),
        )

    def call(self, target: object, arguments: tuple, value: object) -> fx.Node:
        node = self.graph.call_function(target, arguments)
        node.meta["val"] = value
        return node

    def value(self, columns: int) -> Tensor:
        with self.mode:
            return torch.empty((self.rows, columns), dtype=torch.bfloat16, device=CUDA)

    def in_place(self, op: object, arguments: tuple, value: Tensor) -> fx.Node:
        names = [argument.name for argument in op._schema.arguments]
        both = self.graph.call_function(
            torch.ops.higher_order.auto_functionalized,
            (op,),
            dict(zip(names, arguments, strict=True)),
        )
        both.meta["val"] = (None, value)
        return self.call(operator.getitem, (both, 1), value)

    def done(self, result: fx.Node) -> fx.GraphModule:
        self.graph.output((result,))
        return fx.GraphModule({}, self.graph)


def spec(**changes: object) -> TritonSpec:
    bf16 = torch.bfloat16
    fields = {
        **{"x_dtype": bf16, "bank_dtype": bf16, "y_dtype": bf16, "in_features": K},
        **{"max_rank": RANK, "group": 2, "columns": sum(SIZES)},
        **{"siblings": (0, 1), "offsets": (0, SIZES[0]), "sizes": SIZES},
        **changes,
    }
    return TritonSpec(DeltaSpec(**fields), bf16)


def kernel_for(strategy: str, rows: int = 37, **changes: object) -> int:
    kernel = build(spec(**changes), strategy, rows_hint=rows, device=CUDA)
    assert kernel is not None
    return kernel


lora = torch.ops.lorafx
OPS = (
    lora.triton_linear.default,
    lora.triton_delta_.default,
    lora.triton_embedding_delta_.default,
    lora.triton_concat_.default,
)
KERNEL_CALL = torch.ops.higher_order.triton_kernel_wrapper_functional


def linear_graph(strategy: str) -> tuple[fx.GraphModule, int, Builder]:
    """x → triton_linear."""
    b, kernel = Builder(), kernel_for(strategy)
    x, weight = b.input("x", (b.rows, K)), b.input("weight", (sum(SIZES), K))
    arguments = (x, weight, None, *b.bank(), 5, kernel)
    return b.done(b.call(OPS[0], arguments, b.value(sum(SIZES)))), kernel, b


def delta_graph(strategy: str, rows: int = 37) -> tuple[fx.GraphModule, int, Builder]:
    """x → mm → triton_delta_ in place → y · 2."""
    b, kernel = Builder(), kernel_for(strategy, rows)
    x, weight = b.input("x", (b.rows, K)), b.input("weight", (K, sum(SIZES)))
    value = b.value(sum(SIZES))
    y = b.call(torch.ops.aten.mm.default, (x, weight), value)
    written = b.in_place(OPS[1], (y, x, *b.bank(), 5, kernel), value)
    return b.done(b.call(torch.ops.aten.mul.Tensor, (written, 2), value)), kernel, b


def embedding_graph() -> tuple[fx.GraphModule, int, Builder]:
    """ids, y → triton_embedding_delta_ in place."""
    changes = {"in_features": 0, "group": 1, "columns": K, "siblings": (0,), "offsets": (0,)}
    kernel = kernel_for("embedding", **changes, sizes=(K,), embedding=True)
    b = Builder()
    ids, y = b.input("ids", (b.rows,), torch.int64), b.input("y", (b.rows, K))
    written = b.in_place(OPS[2], (y, ids, *b.bank(embedding=True), 5, kernel), y.meta["val"])
    return b.done(written), kernel, b


def kernel_calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is KERNEL_CALL]


def inlined(gm: fx.GraphModule) -> list[fx.Node]:
    """The kernel calls of `gm` after its only op was inlined; nothing of the op is left."""
    with compile_only_gpu():
        assert len(inline_triton_ops(gm, OPS)) == 1
    gm.graph.lint()
    gm.recompile()
    for node in gm.graph.nodes:
        assert node.target not in OPS
        assert node.target is not torch.ops.higher_order.auto_functionalized
        if node.op == "call_function":
            assert "val" in node.meta
    return kernel_calls(gm)


def sizes_of_grid(call: fx.Node, rows: int) -> tuple[int, ...]:
    """The grid for so many rows, as the graph computes it."""

    def value(item: object) -> int:
        if not isinstance(item, fx.Node):
            return int(item)
        symint = item.meta["val"]
        free = symint.node.expr.free_symbols
        return int(symint.node.expr.xreplace(dict.fromkeys(free, rows)))

    return tuple(value(item) for item in call.kwargs["grid"][0])


@pytest.mark.parametrize("strategy", ["split", "epilogue"])
def test_linear_becomes_its_kernels_with_a_grid_of_the_rows(strategy: str) -> None:
    gm, kernel, _ = linear_graph(strategy)
    calls = inlined(gm)
    plan = plan_of(kernel)
    assert len(calls) == len(plan.all_kernels)
    tiles = list(plan.kernels.values())[-1].tiles
    columns = sum(-(-size // tiles.block_n) for size in SIZES)
    for rows in (1, 37, 4096):
        tall = -(-rows // tiles.block_m)
        assert sizes_of_grid(calls[-1], rows) == (tall * columns, 1, 1)
    assert "y_ptr" in calls[-1].kwargs["tensors_to_clone"]
    assert calls[-1].kwargs["kwargs"]["M"].meta["val"].node.expr.free_symbols


def test_nothing_about_slots_is_in_the_graph() -> None:
    """Slots, ranks and factors are pointers; whatever else a kernel takes is a size."""
    for gm, _, _ in (linear_graph("epilogue"), delta_graph("segments", 4096), embedding_graph()):
        for call in inlined(gm):
            for name, argument in call.kwargs["kwargs"].items():
                if isinstance(argument, fx.Node):
                    is_tensor = isinstance(argument.meta["val"], Tensor)
                    assert is_tensor == name.endswith("_ptr")
        assert not any(node.target is torch.ops.aten._local_scalar_dense.default
                       for node in gm.graph.nodes)  # fmt: skip


def test_one_tensor_in_two_places_is_not_two_tensors() -> None:
    """A body traced for distinct inputs is not reused where two of them are one node."""
    b, kernel = Builder(), kernel_for("epilogue", group=1, siblings=(0,), offsets=(0,),
                                      sizes=(K,), columns=K)  # fmt: skip
    x, w, other = b.input("x", (b.rows, K)), b.input("w", (K, K)), b.input("other", (K, K))
    A, B = b.input("A", (SLOTS, RANK, K)), b.input("B", (SLOTS, RANK, K))
    ranks = b.input("ranks", (SLOTS, 1), torch.int32)
    scales = b.input("scales", (SLOTS, 1), torch.float32)
    slots = b.input("slots", (8,), torch.int32)
    outputs = [
        b.call(OPS[0], (x, weight, None, a, B, ranks, scales, slots, 5, kernel), b.value(K))
        for weight, a in ((w, A), (other, B))
    ]
    b.graph.output(tuple(outputs))
    gm = fx.GraphModule({}, b.graph)
    with compile_only_gpu():
        inline_triton_ops(gm, OPS)
    calls = [call.kwargs["kwargs"] for call in kernel_calls(gm)]
    assert [call["a_ptr"] for call in calls if "a_ptr" in call] == [A, B]
    assert [(call["w_ptr"], call["b_ptr"]) for call in calls if "w_ptr" in call] == [
        (w, B),
        (other, B),
    ]


def test_a_body_that_does_not_trace_is_an_error_naming_the_op() -> None:
    b = Builder()
    x, weight = b.input("x", (b.rows, K)), b.input("weight", (sum(SIZES), K))
    arguments = (x, weight, None, *b.bank(), 5, 12345)  # no such kernel
    gm = b.done(b.call(OPS[0], arguments, b.value(sum(SIZES))))
    with pytest.raises(LoweringError, match=r"triton_linear.*could not be traced.*12345"):
        inline_triton_ops(gm, OPS)


def test_inductor_calls_the_kernel_on_the_buffer_of_the_product() -> None:
    """No copy of y, no opaque op: the kernel is in Inductor's own code, its grid an expression."""
    gm, kernel, b = delta_graph("gemv", 8)
    inlined(gm)
    text = generated_code(gm, b.mode)
    names = [k.jit.__name__ for k in plan_of(kernel).all_kernels]
    for name in names:
        assert f"def {name}(" in text
    assert "torch.ops.lorafx" not in text
    body = text[text.index("def call(") :]
    product = body.index("extern_kernels.mm(")
    buffer = body[product:].partition("out=")[2].partition(")")[0]
    run = re.search(rf"{names[-1]}_\d+\.run\((.*)\)", body)
    assert run is not None
    assert buffer in run[1].split(", ")
    assert re.search(r"s\d+", run[1])  # the grid is an expression of M's symbol
    assert "clone" not in body
