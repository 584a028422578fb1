"""The lowered graph in a file, and its companions.

lorafx's generated kernels are found by a hash of their source, and rebuilt. A pickle refers to
existing objects: a site, a group, the program, a module by its place in the program, and stand-ins
for names that each process chooses. Tensors are refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorafx.capture.lowering import NodeByNode
from lorafx.capture.saved_graphs.fingerprints import Undescribed
from lorafx.kernels.cpu import dense
from lorafx.kernels.cpu.delta_kernels import build, build_all
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

#: Numbers in a literal tensor of the model's code, such as `torch.tensor([])`.
_CONSTANT = 1024

Boxed = Callable[[list[Any]], Any]

#: Process-specific names of Dynamo and lorafx -> stand-ins in files.
PortableNames = Mapping[str, str]

#: The slots of the program's marks, the global of the compiled graph, and the global of built-in
#: functions. `<module x>` is the global of Python's module x.
SLOTS, GRAPH, BUILTINS = "<slots>", "<graph>", "<builtins>"


@dataclass
class SavedLowered:
    """A graph: `operators` of plain aten, or `compiled` by Inductor."""

    kernels: dict[DeltaSpec, int]
    operators: bytes | None = None
    compiled: bytes | None = None

    @classmethod
    def of(cls, lowered: Any, kernels: Mapping[DeltaSpec, int]) -> SavedLowered:
        if isinstance(lowered, NodeByNode):
            return cls(dict(kernels), operators=_operators(lowered.graph_module))
        if isinstance(lowered, CompiledFxGraph):
            return cls(dict(kernels), compiled=_compiled(lowered))
        raise Undescribed(f"a graph lowered to {type(lowered).__name__}")

    def load(self) -> Boxed:
        """The runnable graph. Raises Undescribed where a kernel has changed."""
        build_all(self.kernels)
        for dtype in {spec.y_dtype for spec in self.kernels}:
            dense.ready(dtype)
        for spec, kernel in self.kernels.items():
            if build(spec) != kernel:
                raise Undescribed(f"the kernel of {spec} is another one here")
        if self.compiled is not None:
            return _from_inductor(self.compiled)
        assert self.operators is not None
        gm: Any = GraphPickler.loads(self.operators, FakeTensorMode(shape_env=ShapeEnv()))
        gm.recompile()
        return NodeByNode(gm)


def _few_numbers(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if value.numel() > _CONSTANT or isinstance(value, torch.nn.Parameter):
            raise Undescribed(f"a graph that holds a tensor of its own, {name}")


def _operators(gm: fx.GraphModule) -> bytes:
    _few_numbers(dict(gm.named_parameters()) | dict(gm.named_buffers()))
    bare = copy(gm)
    bare.meta = {}
    options = Options(ops_filter=None, node_metadata_key_filter=lambda key: False)
    return GraphPickler.dumps(bare, options)


def _compiled(graph: CompiledFxGraph) -> bytes:
    _few_numbers(graph.constants or {})
    if graph.frozen_param_names:
        raise Undescribed("a graph with frozen weights")
    kept = copy(graph)
    kept.prepare_for_serialization()
    return pickle.dumps(kept)


def _from_inductor(data: bytes) -> Boxed:
    forward = BundledCompiledForward(pickle.loads(data))
    settings: Any = {
        "cudagraphs": BoxedBool(False),
        "boxed_forward_device_index": BoxedDeviceIndex(None),
        "is_backward": False,
    }
    with outside_of_frames():
        found: Boxed = forward.post_compile(forward.load([]), settings)
    return found


def renamed(text: str, names: PortableNames) -> str:
    """`text` with these names replaced, alone or in an expression."""
    if text in names:
        return names[text]
    for before, after in names.items():
        if before in text:  # in expressions names are keys, in quotes: G['name']
            text = text.replace(repr(before), repr(after))
    return text


def dump(value: object, program: Program, names: PortableNames) -> bytes:
    """The pickle of `value`. Raises Undescribed for tensors, and `pickle`'s errors."""
    buffer = io.BytesIO()
    _Pickler(buffer, program, names).dump(value)
    return buffer.getvalue()


def load(data: bytes, program: Program, names: PortableNames) -> Any:
    """The unpickled value, with the program's objects."""
    return _Unpickler(io.BytesIO(data), program, names).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, program: Program, names: PortableNames) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = {name: stand_in for stand_in, name in names.items()}
        self._places: dict[int, tuple[str, Any]] = {
            id(program): ("program", None),
            id(program.runtime): ("runtime", None),
            id(program.model): ("module", ""),
        }
        for path, module in program.model.named_modules():
            self._places[id(module)] = "module", path
        for kind, items in (("site", program.sites), ("group", program.groups)):
            self._places.update((id(item), (kind, index)) for index, item in enumerate(items))

    def persistent_id(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, str):
            text = renamed(value, self._names)
            return None if text == value else ("text", text)
        if id(value) in self._places:
            return self._places[id(value)]
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
        kind, where = place
        program = self._program
        if kind == "text":
            return renamed(where, self._names)
        if kind == "site":
            return program.sites[where]
        if kind == "group":
            return program.groups[where]
        if kind == "module":
            return program.model.get_submodule(where)
        return program if kind == "program" else program.runtime
