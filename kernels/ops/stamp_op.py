"""The ops that stand for a layer while AOTAutograd traces only one of several equal layers.

    lorafx::stamp(values, key)          new tensors of the layouts that are noted for `key`
    lorafx::overwrite(written, value)   written becomes value, which is laid out like it

A stamp never runs: lorafx.capture.stamps removes all of them from the graph. In the traced graph an
overwritten tensor is the value itself: Tensor.copy_ expands and compares symbolic sizes, 4 ms of
tracing each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.errors import CaptureError
from lorafx.kernels.ops.op_library import define, define_on
from lorafx.torch_internals import graph_parts
from lorafx.torch_internals.graph_parts import (
    FakeTensor,
    FakeTensorMode,
    _DisableTorchDispatch,
    in_kernel_invocation_manager,
)


class Layout(NamedTuple):
    shape: tuple[int | torch.SymInt, ...]
    strides: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Layout:
        return cls(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)

    def empty(self, mode: FakeTensorMode) -> FakeTensor:
        with _DisableTorchDispatch():
            # Allocating a symbolic size takes twenty times as long, all of it arithmetic on
            # symbols; only the identity of this memory matters.
            nothing = torch.empty(0, dtype=self.dtype, device="meta")
            meta = nothing.as_strided(self.shape, self.strides)
        return FakeTensor(mode, meta, self.device)

    def view_of(self, other: FakeTensor, offset: int | torch.SymInt) -> FakeTensor:
        """A fake tensor of this layout in the memory of `other`, from its element `offset` on."""
        mode = other.fake_mode
        with in_kernel_invocation_manager(mode):
            meta = other.as_strided(self.shape, self.strides, offset + other.storage_offset())
        return FakeTensor(mode, meta, self.device)


def without_data(value: Any) -> FakeTensor:
    """A tensor laid out like `value`, in new memory, without costly symbolic arithmetic."""
    return Layout.of(value).empty(value.fake_mode)


#: Results of the ops of the running capture, by key.
LAYOUTS: dict[int, Sequence[Layout]] = {}


def stamp(values: Sequence[Tensor], key: int) -> list[Tensor]:
    raise CaptureError("lorafx::stamp stands for a layer while it is traced, and computes nothing")


def stamp_fake(values: Sequence[Tensor], key: int) -> Sequence[Tensor]:
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    return [layout.empty(mode) for layout in LAYOUTS[key]]


define("stamp(Tensor[] values, int key) -> Tensor[]", stamp, stamp_fake)


def overwrite(written: Tensor, value: Tensor) -> None:
    written.copy_(value)


def overwrite_fake(written: Tensor, value: Tensor) -> None:
    pass


def overwrite_functional(written: Tensor, value: Tensor) -> None:
    """Functionalization of an operator that writes; both arguments are its wrappers."""
    graph_parts._sync(value)
    graph_parts._functionalize_replace(written, graph_parts._from_functional_tensor(value))
    graph_parts._functionalize_commit_update(written)
    graph_parts._functionalize_sync(written)


define("overwrite(Tensor(a!) written, Tensor value) -> ()", overwrite, overwrite_fake)
define_on("Functionalize", "overwrite", overwrite_functional)
