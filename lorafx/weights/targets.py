"""Targets: parameters and buffers of a model that a checkpoint may fill, by any of their names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.model.module_graph import Holder, ModuleGraph, storage_key
from lorafx.model.saved_names import SavedNames
from lorafx.model.weight_formats import is_wrapped, plain_tensors

WeightShape = tuple[int, ...]
#: Indices of a part of a checkpoint tensor.
Take = tuple[slice | int, ...]
#: A part of a target: a box of indices, or pieces of a layer's parameter.
Part = tuple[range, ...] | frozenset[Any]


@dataclass(frozen=True)
class Target(Holder):
    """A parameter or buffer. `tensor` is looked up, since packing changes a parameter's storage."""

    @property
    def is_buffer(self) -> bool:
        return self.attribute in self.module._buffers

    @property
    def persistent(self) -> bool:
        return self.attribute not in self.module._non_persistent_buffers_set


class WeightNames(SavedNames):
    """Finds names of a checkpoint among the tensors of one model."""

    def __init__(self, graph: ModuleGraph, model: nn.Module) -> None:
        super().__init__(model)
        self.graph = graph
        self._targets: dict[tuple[int, str], Target] = {}
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._targets[id(module), name] = Target(path, module, name)
        #: How many names a tensor has, by its memory.
        self.name_counts = Counter(
            memory_key(tensor)
            for iterate in (model.named_parameters, model.named_buffers)
            for _, tensor in iterate(remove_duplicate=False)
        )

    @property
    def targets(self) -> list[Target]:
        """All parameters and buffers, each by its first name."""
        return list(self._targets.values())

    def target(self, module: nn.Module, attribute: str) -> Target | None:
        return self._targets.get((id(module), attribute))


def held(tensor: Tensor) -> Tensor:
    """The tensor whose memory stands for that of `tensor`: the first that a wrapper consists of."""
    return next(plain_tensors(tensor)) if is_wrapped(tensor) else tensor


def memory_key(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for tensors with the same numbers in memory."""
    tensor = held(tensor)
    if storage_key(tensor) < 0:  # a wrapper without a storage of its own
        return (id(tensor),)
    return (storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and memory_key(a) == memory_key(b)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several entries share memory, so that torch refuses to write the tensor."""
    if tensor.layout is not torch.strided:
        return False
    return any(
        size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def overlapping(a: Part, b: Part) -> bool:
    """Whether two parts of a target share an entry; ranges of a dimension have one step, or one of
    them is all of it."""
    if isinstance(a, frozenset) or isinstance(b, frozenset):
        # Only the layer knows the indices of its pieces.
        return not (isinstance(a, frozenset) and isinstance(b, frozenset)) or bool(a & b)
    return all(
        p
        and q
        and max(p[0], q[0]) <= min(p[-1], q[-1])
        # Interleaved halves have every other index.
        and (p.step != q.step or (p[0] - q[0]) % p.step == 0)
        for p, q in zip(a, b, strict=True)
    )


def dtype_refusal(target: Tensor, source: Tensor) -> str:
    dtype, new = target.dtype, source.dtype
    if source.is_meta or source.layout is not torch.strided:
        what = f"{source.layout}, on {source.device}"
        return f"the checkpoint's ({what}) is no dense tensor with values"
    wrapped, source_wrapped = map(is_wrapped, (target, source))
    if wrapped or source_wrapped:
        if source_wrapped and type(source) in (type(target), type(target.data)):
            alike = _parts_of(source) == _parts_of(target)
            kind = f"its {type(source).__name__} has parts of other sizes or settings"
            return "" if alike else f"{kind} than the one here; quantise it alike"
        if source_wrapped:
            return f"the checkpoint's is a {type(source).__name__}; give the plain whole tensor"
        kind = type(target.data).__name__
        return f"it is kept here as a {kind}, not as plain numbers; give one quantised alike"
    if dtype == new:
        return ""
    if dtype.itemsize == 1 or not dtype.is_floating_point:
        return f"it is quantised here ({dtype}), and the checkpoint's numbers are {new}"
    if new.itemsize == 1 or not new.is_floating_point:
        return f"the checkpoint's numbers are {new}, which do not become {dtype} without a scale"
    return ""


def _parts_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two wrappers have in common if one can be written into the other, part by part."""
    names, settings = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return names, settings, [(part.shape, part.dtype) for part in plain_tensors(tensor)]
