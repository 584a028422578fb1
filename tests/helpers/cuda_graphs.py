"""Graphs over fake CUDA tensors as `lower` leaves them, built by hand."""

from __future__ import annotations

import operator

import torch
from compile_only_gpu import CUDA
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.build import TritonSpec, build

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
