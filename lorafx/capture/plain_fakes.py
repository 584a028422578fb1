"""Fake tensors of weights and banks, which are most inputs of a graph, made directly.

Dynamo describes a tensor in fifty attributes, makes symbols of its sizes, finds them to be numbers
where they are fixed, and asserts that what comes out is like the tensor: 0.6 ms. Of a tensor that
is no view, with fixed sizes and without a gradient, that leaves an empty tensor on `meta`, in the
memory that stands for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.meta_utils import MetaConverter
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    StatefulSymbolicContext,
    StatelessSymbolicContext,
)
from torch.nested._internal import nested_tensor

_CONVERT: Callable[..., Any] = MetaConverter.__call__
_FIXED = {DimDynamic.STATIC}
_STRIDES = {DimDynamic.STATIC, DimDynamic.INFER_STRIDE}
_FUNCTIONALIZE = torch._C.DispatchKey.Functionalize


@contextmanager
def plain_fakes() -> Iterator[None]:
    """Inside, `FakeTensorMode.from_tensor` makes plain tensors so. (Dynamo holds its lock
    meanwhile.)"""
    before = MetaConverter.__call__
    setattr(MetaConverter, "__call__", _converted)  # noqa: B010  a method for mypy
    try:
        yield
    finally:
        setattr(MetaConverter, "__call__", before)  # noqa: B010


def _converted(self: Any, tensor: Tensor, shape_env: Any = None, **named: Any) -> Any:
    """In place of `MetaConverter.__call__`."""
    callback = named.get("callback")
    recorded = shape_env is not None and shape_env.should_record_events
    if callback is None or recorded or not _are_fixed(named.get("symbolic_context")):
        return _CONVERT(self, tensor, shape_env, **named)
    describer = self.describer
    known = describer.lookup_tensor.get(tensor) in self.tensor_memo
    if self.copy_data or known or not _is_plain(tensor):
        return _CONVERT(self, tensor, shape_env, **named)
    self.hit += 1
    self.arg_cnt += 1
    with torch.inference_mode(False):
        fake = _made(self, tensor, partial(callback, device=tensor.device))
        if tensor.requires_grad:
            fake.requires_grad = True
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    self.tensor_memo[describer.get_tensor_id(tensor)] = fake
    return fake


def _made(converter: Any, tensor: Tensor, make: Callable[..., Any]) -> Any:
    """A tensor without data that shares memory with what stands for those in this one's memory."""
    offset, shape, strides = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    kind, memory = tensor.dtype, tensor.untyped_storage()
    place, places = converter.describer.get_storage_id(memory), converter.storage_memo
    there = places.get(place)
    if there is None and offset:
        whole = make(lambda: torch.empty(memory.size(), dtype=torch.uint8, device="meta"))
        there = places[place] = whole.untyped_storage()

    def empty() -> Tensor:
        if there is None:
            return torch.empty_strided(shape, strides, dtype=kind, device="meta")
        return torch.empty(0, dtype=kind, device="meta").set_(there, offset, shape, strides)

    fake = make(empty)
    if there is None:
        places[place] = fake.untyped_storage()
    return fake


def _are_fixed(context: Any) -> bool:
    """Whether all sizes of a tensor are to be numbers."""
    return (
        type(context) in (StatefulSymbolicContext, StatelessSymbolicContext)
        and _FIXED.issuperset(context.dynamic_sizes)
        and _STRIDES.issuperset(context.dynamic_strides)
        and _are_none(context.constraint_sizes)
        and _are_none(context.constraint_strides)
        and context.view_base_context is None
        and not any(getattr(context, "specialize_on", None) or ())
    )


def _are_none(items: Sequence[Any]) -> bool:
    return all(item is None for item in items)


def _is_plain(tensor: Tensor) -> bool:
    """Whether there is nothing to a tensor but its layout in memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type not in ("meta", "lazy", "xla")
        and tensor.is_leaf
        and tensor.grad is None
        and not (
            tensor._is_view()
            or tensor.is_inference()
            or tensor.is_nested
            or tensor.is_quantized
            or tensor.is_conj()
            or tensor.is_neg()
            or getattr(tensor, "_is_buffer", False)
            or torch._is_functional_tensor(tensor)
            or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._dispatch_tls_is_dispatch_key_included(_FUNCTIONALIZE)
            or tensor in nested_tensor._tensor_symint_registry
        )
        and tensor.untyped_storage().size() > 0
    )
