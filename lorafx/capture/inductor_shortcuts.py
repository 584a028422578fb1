"""What Inductor does for logs that nobody keeps, and what it works out though it is plain to see.

Its graph is the same. All of this grows with the calls of outlined layers, each of which has some
thirty operands.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorafx.captured_frame import size_expression


@contextmanager
def shortcuts() -> Iterator[None]:
    """Inside, Inductor

    - does not describe each input for a log line of its cache, nor print a script that would
      compile the graph again, unless such logs are kept: 3 % of the capture of 32 layers;
    - sees that layouts are equal where they are the same numbers and expressions, before it asks a
      solver: as it compares each call of an outlined layer with the body, and as it has operands
      laid out in the way that they are;
    - works out once whether tensors so laid out have gaps: it asks for each result.
    """
    replaced = list(_replacements())
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    try:
        for owner, name, found in replaced:
            setattr(owner, name, found)
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)


def _replacements() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    from torch._dynamo.repro import after_aot
    from torch._inductor import codecache, fx_utils, ir, lowering

    if "TORCH_TRACE" not in os.environ and not torch._dynamo.config.repro_after:
        yield after_aot, "save_graph_repro", _no_script
        if not codecache.log.isEnabledFor(logging.DEBUG):
            yield codecache.FxGraphCachePickler, "debug_lines", _no_lines
    if hasattr(fx_utils, "_is_fake_tensor_same"):  # since torch 2.13
        yield fx_utils, "_is_fake_tensor_same", _comparing(fx_utils._is_fake_tensor_same)
        yield fx_utils, "sym_eq", _seeing(fx_utils.sym_eq)
    constrain = lowering.constrain_to_fake_tensor

    def constrained(operand: Any, wanted: Any) -> Any:
        inner = operand.data if isinstance(operand, ir.TensorBox) else operand
        buffer = inner.data if isinstance(inner, ir.StorageBox) else None
        if isinstance(buffer, ir.Buffer) and isinstance(wanted, Tensor):
            layout = buffer.layout
            strides = _expressions(wanted.stride())
            if isinstance(layout, ir.FixedLayout) and tuple(layout.stride) == strides:
                return operand
        return constrain(operand, wanted)

    yield lowering, "constrain_to_fake_tensor", constrained
    yield ir, "significant_strides_equal", _equal_strides(ir.significant_strides_equal)
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false
    yield torch._prims_common, "is_non_overlapping_and_dense_or_false", _once_a_layout(dense)


def _expressions(sizes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(size_expression, sizes))


def _equal_strides(equal: Callable[[Any, Any, Any], bool]) -> Callable[[Any, Any, Any], bool]:
    def are_equal(one: Any, other: Any, shape: Any) -> bool:
        return _expressions(one) == _expressions(other) or equal(one, other, shape)

    return are_equal


def _once_a_layout(dense: Callable[[Tensor], bool]) -> Callable[[Tensor], bool]:
    known: dict[Any, bool] = {}

    def is_dense(tensor: Tensor) -> bool:
        if tensor.layout is not torch.strided:
            return dense(tensor)
        layout = (_expressions(tensor.shape), _expressions(tensor.stride()))
        if layout not in known:
            known[layout] = dense(tensor)
        return known[layout]

    return is_dense


def _seeing(equal: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Whether sizes are equal, where each is the same number or expression as the other."""

    def is_equal(new: Any, old: Any) -> Any:
        if not (isinstance(new, tuple) and isinstance(old, tuple)):
            return equal(new, old)
        return _expressions(new) == _expressions(old) or equal(new, old)

    return is_equal


def _comparing(same: Callable[..., bool]) -> Callable[..., bool]:
    def is_same(new: Any, old: Any, *args: Any, **kwargs: Any) -> bool:
        if new is old or (not kwargs.get("check_storage", True) and _laid_out_alike(new, old)):
            return True
        return same(new, old, *args, **kwargs)

    return is_same


def _no_lines(*_: Any) -> list[str]:
    return []


def _no_script(*_: Any, **__: Any) -> None:
    pass


def _laid_out_alike(new: Any, old: Any) -> bool:
    if not (isinstance(new, FakeTensor) and isinstance(old, FakeTensor)):
        return False
    if new.layout is not torch.strided or old.layout is not torch.strided:
        return False
    return (
        new.device == old.device
        and _expressions(new.shape) == _expressions(old.shape)
        and _expressions(new.stride()) == _expressions(old.stride())
    )
