"""A graph as its lowering made it, in a file: Inductor's code, or the operators themselves.

Generated kernels of lorafx are found by an id that is a hash of their source. They are built again
before the graph runs; their libraries lie in a cache of their own, and so do those of Inductor.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.capture.lowering import NodeByNode
from lorafx.kernels.cpu import dense
from lorafx.kernels.cpu.delta_kernels import build, build_all
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.saved_graphs.fingerprints import Undescribed
from lorafx.torch_internals.fake_tensors import FakeTensorMode
from lorafx.torch_internals.frames import outside_of_frames
from lorafx.torch_internals.saved_code import CompiledFxGraph
from lorafx.torch_internals.symbols import ShapeEnv

#: Numbers in a tensor that the model's code writes out, such as `torch.tensor([])`.
_CONSTANT = 1024

Boxed = Callable[[list[Any]], Any]


@dataclass
class SavedLowered:
    """One graph: `operators` of plain aten or `compiled` by Inductor."""

    kernels: dict[DeltaSpec, int]
    operators: bytes | None = None
    compiled: bytes | None = None

    @classmethod
    def of(cls, lowered: Any, kernels: Mapping[DeltaSpec, int]) -> SavedLowered:
        """Raises Undescribed for what is neither."""
        if isinstance(lowered, NodeByNode):
            return cls(dict(kernels), operators=_operators(lowered.graph_module))
        if isinstance(lowered, CompiledFxGraph):
            return cls(dict(kernels), compiled=_compiled(lowered))
        raise Undescribed(f"a graph lowered to {type(lowered).__name__}")

    def load(self) -> Boxed:
        """The graph, ready to run.

        Raises:
            Undescribed: a kernel is not what it was.
        """
        build_all(self.kernels)
        for dtype in {spec.y_dtype for spec in self.kernels}:
            dense.joined_ready(dtype)
        for spec, kernel in self.kernels.items():
            if build(spec) != kernel:
                raise Undescribed(f"the kernel of {spec} is another one here")
        if self.compiled is not None:
            return _from_inductor(self.compiled)
        assert self.operators is not None
        return _from_operators(self.operators)


def _few_numbers(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises Undescribed where one of them may be the model's."""
    for name, value in tensors.items():
        if value.numel() > _CONSTANT or isinstance(value, torch.nn.Parameter):
            raise Undescribed(f"a graph that holds a tensor of its own, {name}")


def _operators(gm: fx.GraphModule) -> bytes:
    from lorafx.torch_internals.saved_code import GraphPickler, Options

    _few_numbers(dict(gm.named_parameters()) | dict(gm.named_buffers()))
    bare = copy(gm)
    bare.meta = {}
    options = Options(ops_filter=None, node_metadata_key_filter=lambda key: False)
    return GraphPickler.dumps(bare, options)


def _from_operators(data: bytes) -> Boxed:
    from lorafx.torch_internals.saved_code import GraphPickler

    gm: Any = GraphPickler.loads(data, FakeTensorMode(shape_env=ShapeEnv()))
    gm.recompile()
    return NodeByNode(gm)


def _compiled(graph: CompiledFxGraph) -> bytes:
    """As torch's own caches write it."""
    _few_numbers(graph.constants or {})
    if graph.frozen_param_names:
        raise Undescribed("a graph with frozen weights")
    kept = copy(graph)
    kept.prepare_for_serialization()
    return pickle.dumps(kept)


def _from_inductor(data: bytes) -> Boxed:
    """As torch's own caches load it."""
    from lorafx.torch_internals.saved_code import (
        BoxedBool,
        BoxedDeviceIndex,
        BundledCompiledForward,
    )

    forward = BundledCompiledForward(pickle.loads(data))
    settings: Any = {
        "cudagraphs": BoxedBool(False),
        "boxed_forward_device_index": BoxedDeviceIndex(None),
        "is_backward": False,
    }
    with outside_of_frames():
        found: Boxed = forward.post_compile(forward.load([]), settings)
    return found
