"""Triton cases and models on a device, and CUDA graphs of what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from delta_oracle import Problem
from dense_merge import Case as ModelCase
from dense_merge import error
from torch import Tensor
from triton_cases import LINEAR, Case, lora

import lorafx
from lorafx.kernels.triton.build import build

#: float32 sums in another order than on the CPU, over a few layers.
TOLERANCE = 1e-4


def moved(case: Case, device: torch.device) -> Case:
    """The same case with its tensors on `device`."""
    tensors = ("y", "x", "A", "B", "ranks", "scales", "slots")
    p = case.problem
    problem: Problem = replace(p, **{name: getattr(p, name).to(device) for name in tensors})
    bias = None if case.bias is None else case.bias.to(device)
    return Case(problem, case.weight.to(device), bias, case.transposed)


def kernel_on(case: Case, strategy: str, device: torch.device) -> int:
    kernel = build(case.spec, strategy, rows_hint=case.problem.x.shape[0], device=device)
    assert kernel is not None
    return kernel


def call_of(case: Case, strategy: str, kernel: int) -> Callable[[], Tensor]:
    """What computes y by the op of `strategy`, from the case's tensors as they are then."""
    p = case.problem
    if strategy in LINEAR:
        return lambda: lora.triton_linear(p.x, case.weight, case.bias, *p.bank, p.rows, kernel)
    op = lora.triton_embedding_delta_ if p.embedding else lora.triton_delta_

    def call() -> Tensor:
        y = p.y.clone()
        op(y, p.x, *p.bank, p.rows, kernel)
        return y

    return call


def write(target: Case, source: Case) -> None:
    """Bank, slots and activations of `source` into the tensors of `target`, in place."""
    for name in ("y", "x", "A", "B", "ranks", "scales", "slots"):
        getattr(target.problem, name).copy_(getattr(source.problem, name))


@dataclass
class Captured:
    """A CUDA graph and the tensor that it writes its result to."""

    graph: Any
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        torch.cuda.synchronize()
        return self.output


def captured(call: Callable[[], Tensor]) -> Captured:
    """`call` as a CUDA graph, after it was warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return Captured(graph, output)


def compiled_on(
    case: ModelCase, device: torch.device, config: lorafx.LoraConfig | None = None, **options: Any
) -> lorafx.CompiledModel:
    """The case's model on `device`, compiled with its adapters by the Triton lowering."""
    settings = {"lowering": "triton", **options}
    model = case.model().to(device)
    if config is None:
        return lorafx.compile(model, case.folders, options=settings)
    return lorafx.compile(model, config, adapters=case.folders, options=settings)


def to(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def assert_served(
    got: Tensor, case: ModelCase, names: Sequence[str | None], inputs: Mapping[str, Tensor]
) -> None:
    """`got`, logits of these requests, are the merged models'; `inputs` on the CPU."""
    assert error(got.cpu(), case.expected(names, inputs)) <= TOLERANCE
