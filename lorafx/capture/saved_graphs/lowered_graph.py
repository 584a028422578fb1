"""Pickles of a lowered graph and of what belongs to it.

lorafx's generated kernels are rebuilt, and compared by a hash of their source. The program, its
sites, groups and modules are pickled as references by their place in the program, and names that
each process chooses as stand-ins. Tensors are refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorafx.capture.lowering import Boxed, NodeByNode
from lorafx.capture.saved_graphs.fingerprints import Undescribed
from lorafx.kernels.cpu.delta_kernels import build, build_all
from lorafx.kernels.cpu.weight_mm import ready
from lorafx.kernels.cpu.weight_source import WeightSpec
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.program.program import Program
from lorafx.torch_internals.frames import outside_of_frames
from lorafx.torch_internals.graph_parts import DispatchKeySet, FakeTensorMode, ShapeEnv
from lorafx.torch_internals.saved_graphs import (
    BoxedBool,
    BoxedDeviceIndex,
    BundledCompiledForward,
    CompiledFxGraph,
    GraphPickler,
    Options,
)

#: The most elements of a tensor that the model's code makes of literals, as `torch.tensor([1, 2])`.
_MAX_LITERALS = 1024

#: Stand-ins in files -> names of Dynamo and lorafx in this process.
PortableNames = Mapping[str, str]

#: Stand-ins for the key of the slots of the program's marks, for the global of the compiled graph,
#: and for that of built-in functions. `<module x>` stands for the global of Python's module x.
SLOTS, GRAPH, BUILTINS = "<slots>", "<graph>", "<builtins>"


@dataclass
class SavedLowered:
    """A lowered graph and its kernels: `operators` of plain aten, or `compiled` by Inductor."""

    kernels: dict[DeltaSpec, int]
    operators: bytes | None = None
    compiled: bytes | None = None

    @classmethod
    def of(cls, lowered: Any, kernels: Mapping[DeltaSpec, int]) -> SavedLowered:
        if isinstance(lowered, NodeByNode):
            return cls(dict(kernels), operators=_pickled_operators(lowered.graph_module))
        if isinstance(lowered, CompiledFxGraph):
            return cls(dict(kernels), compiled=_pickled_by_inductor(lowered))
        raise Undescribed(f"a graph lowered to {type(lowered).__name__}")

    def load(self) -> Boxed:
        """The graph as a function. Raises Undescribed if a kernel differs from the saved one."""
        build_all(self.kernels)
        for dtype in {spec.y_dtype for spec in self.kernels}:
            ready(WeightSpec(dtype, dtype))
        for spec, kernel in self.kernels.items():
            if build(spec) != kernel:
                raise Undescribed(f"the kernel of {spec} is another one here")
        if self.compiled is not None:
            return _loaded_by_inductor(self.compiled)
        assert self.operators is not None
        gm: Any = GraphPickler.loads(self.operators, FakeTensorMode(shape_env=ShapeEnv()))
        gm.recompile()
        return NodeByNode(gm)


def _refuse_weights(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if value.numel() > _MAX_LITERALS or isinstance(value, torch.nn.Parameter):
            raise Undescribed(f"a graph that holds a tensor of its own, {name}")


def _pickled_operators(gm: fx.GraphModule) -> bytes:
    _refuse_weights(dict(gm.named_parameters()) | dict(gm.named_buffers()))
    without_meta = copy(gm)
    without_meta.meta = {}
    options = Options(ops_filter=None, node_metadata_key_filter=lambda key: False)
    return GraphPickler.dumps(without_meta, options)


def _pickled_by_inductor(graph: CompiledFxGraph) -> bytes:
    _refuse_weights(graph.constants or {})
    if graph.frozen_param_names:
        raise Undescribed("a graph with frozen weights")
    serialisable = copy(graph)
    serialisable.prepare_for_serialization()
    return pickle.dumps(serialisable)


def _loaded_by_inductor(data: bytes) -> Boxed:
    forward = BundledCompiledForward(pickle.loads(data))
    settings: Any = {
        "cudagraphs": BoxedBool(False),
        "boxed_forward_device_index": BoxedDeviceIndex(None),
        "is_backward": False,
    }
    with outside_of_frames():
        function: Boxed = forward.post_compile(forward.load([]), settings)
    return function


def renamed(text: str, names: PortableNames) -> str:
    """`text` with these names replaced: the whole text, or names in quotes in an expression."""
    if text in names:
        return names[text]
    for before, after in names.items():
        if before in text:  # in expressions names are keys, in quotes: G['name']
            text = text.replace(repr(before), repr(after))
    return text


def dump(value: object, program: Program, names: PortableNames) -> bytes:
    """The pickle of `value`. Raises Undescribed for a tensor or module, and `pickle`'s errors."""
    buffer = io.BytesIO()
    _Pickler(buffer, program, names).dump(value)
    return buffer.getvalue()


def load(data: bytes, program: Program, names: PortableNames) -> Any:
    """The value of a pickle, with references resolved in this program."""
    return _Unpickler(io.BytesIO(data), program, names).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, program: Program, names: PortableNames) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = {name: stand_in for stand_in, name in names.items()}
        self._references: dict[int, tuple[str, Any]] = {
            id(program): ("program", None),
            id(program.runtime): ("runtime", None),
            id(program.model): ("module", ""),
        }
        for path, module in program.model.named_modules():
            self._references[id(module)] = "module", path
        for kind, items in (("site", program.sites), ("group", program.groups)):
            self._references.update((id(item), (kind, index)) for index, item in enumerate(items))

    def persistent_id(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, str):
            text = renamed(value, self._names)
            return None if text == value else ("text", text)
        if id(value) in self._references:
            return self._references[id(value)]
        if isinstance(value, (Tensor, nn.Module)):
            raise Undescribed(f"a {type(value).__name__} in the graph's own data")
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, DispatchKeySet):
            return DispatchKeySet.from_raw_repr, (value.raw_repr(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, program: Program, names: PortableNames) -> None:
        super().__init__(file)
        self._program, self._names = program, names

    def persistent_load(self, place: tuple[str, Any]) -> Any:
        kind, position = place
        program = self._program
        if kind == "text":
            return renamed(position, self._names)
        if kind == "site":
            return program.sites[position]
        if kind == "group":
            return program.groups[position]
        if kind == "module":
            return program.model.get_submodule(position)
        return program if kind == "program" else program.runtime
