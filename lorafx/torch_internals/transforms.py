"""What this thread runs operators for: a transform of torch.func, a derivative, a graph. Importing
it imports neither Dynamo nor Inductor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch import _C, _tensor_str
    from torch._C import _any_requires_grad
    from torch._C import _AutoDispatchBelowAutograd as below_autograd
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import _disable_current_modes


def transform() -> str | None:
    """The running transform in which tensors have no values, or None. Takes 0.2 µs."""
    if _C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (vmap, grad, functionalize)"
    if _C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return "torch.export, make_fx or a FakeTensorMode" if makes_graphs() else None


def makes_graphs() -> bool:
    """Whether operators are recorded, or run on tensors without values. Takes 0.1 µs."""
    kinds = _C._TorchDispatchModeKey
    return bool(_C._len_torch_dispatch_stack()) and any(
        _C._get_dispatch_mode(kind) is not None
        for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL)
    )


def transformed() -> bool:
    """Whether this thread is inside of torch.func's transforms, or of forward-mode derivatives."""
    return _C._functorch.peek_interpreter_stack() is not None or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether tensors may have tangents now, which may be zeros without memory."""
    return bool(forward_ad._current_level >= 0)


def wrapped_by_transform(tensor: Tensor) -> bool:
    """Whether the tensor is one of torch.func's transforms, which has no memory of its own."""
    return bool(_C._functorch.is_functorch_wrapped_tensor(tensor))


def in_backward() -> bool:
    """Whether torch.autograd computes a derivative on this thread now."""
    return _C._current_autograd_node() is not None


def tracing() -> bool:
    """Whether this thread is tracing; torch.compiler.is_compiling() counts other threads, too."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and transform() is not None
    )


@contextmanager
def saved_tensors_hooks_kept() -> Iterator[None]:
    """Enables them again if the block fails and they were before: a graph of torch.func.grad that
    is traced switches them off at its beginning, and on at its end."""
    enabled = _C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    try:
        yield
    except BaseException:
        if enabled:
            _C._autograd._saved_tensors_hooks_enable()
        raise


@contextmanager
def printing_ends() -> Iterator[None]:
    """`Tensor.__repr__` of torch keeps a guard in a local. Where it fails, as it may within
    torch.func's transforms, the guard lives as long as the error's frames. When these are collected
    it puts back the dispatch keys of its birth: gradients are off in this thread from then on."""
    of_torch = _tensor_str._str

    def printed(tensor: Any, *, tensor_contents: str | None = None) -> str:
        with _disable_current_modes(), _C._DisableFuncTorch(), torch.no_grad():
            return _tensor_str._str_intern(tensor, tensor_contents=tensor_contents)

    try:
        _tensor_str._str = printed
        yield
    finally:
        _tensor_str._str = of_torch
