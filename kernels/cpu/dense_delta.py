"""`lorafx::dense_mm_delta` and `lorafx::dense_addmm_delta`: a dense product and its LoRA delta.

    dense_mm_delta      y = x Wᵀ + Δ(x)           Δ is what `run_delta_` adds by the same kernel
    dense_addmm_delta   y = x Wᵀ + b + Δ(x)

On a CPU few rows take one parallel region for both (delta_beside.cpp): first the threads share out
v = x A, then each adds v B to the columns of y that it has just multiplied. Where rows are many,
where no generated kernel multiplies, and on other devices, the two ops run one after the other. y
has the same bits either way.

Inference only: no gradient is registered.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu import dense
from lorafx.kernels.cpu.cpu import dispatcher
from lorafx.kernels.cpu.dense import DENSE_ADDMM, DENSE_MM, dense_addmm_fake, dense_mm_fake
from lorafx.kernels.ops.bank_arguments import BANK, BankArgs
from lorafx.kernels.ops.op_checks import check_bank, check_rows
from lorafx.kernels.ops.op_library import define
from lorafx.kernels.ops.ops import KERNELS

_LOCK = threading.Lock()


def ready(dtype: torch.dtype) -> bool:
    """Whether the ops run in C++ for `dtype`; their libraries are loaded if need be."""
    return dense.ready(dtype) and _installed()


def _installed() -> bool:
    with _LOCK:
        return _install()


@functools.cache
def _install() -> bool:
    try:
        run = ctypes.cast(dispatcher().lorafx_run_delta, ctypes.c_void_p)
        library = dense.op_library()
    except LoweringError:  # told where kernels are built
        return False
    library.lorafx_install_deltas.argtypes = (ctypes.c_void_p,)
    return not library.lorafx_install_deltas(run)


def dense_mm_delta(
    x: Tensor, weight: Tensor, sizes: list[int], bank: BankArgs, rows: int, kernel: int
) -> Tensor:
    """x (M, K) times Wᵀ for W (N, K), and its delta, (M, N) contiguous.

    Args:
        sizes: as `dense_mm` takes them.
        rows, kernel: as `run_delta_` takes them; the kernel is one of a linear's.

    Raises:
        LoweringError: operands that do not fit together, or a kernel that is not loaded.
    """
    # As in `dense_mm`: a graph from a cache may be the first to ask for the kernel in C++.
    if x.device.type == "cpu" and kernel in KERNELS and ready(x.dtype):
        y: Tensor = torch.ops.lorafx.dense_mm_delta(x, weight, sizes, *bank, rows, kernel)
        return y
    y = DENSE_MM(x, weight, sizes)
    torch.ops.lorafx.run_delta_(y, x, *bank, rows, kernel)
    return y


def dense_addmm_delta(
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: list[int],
    bank: BankArgs,
    rows: int,
    kernel: int,
) -> Tensor:
    """`dense_mm_delta` and a bias (N,).

    Raises:
        LoweringError: operands that do not fit together, or a kernel that is not loaded.
    """
    if x.device.type == "cpu" and kernel in KERNELS and ready(x.dtype):
        op = torch.ops.lorafx.dense_addmm_delta
        y: Tensor = op(bias, x, weight, sizes, *bank, rows, kernel)
        return y
    y = DENSE_ADDMM(bias, x, weight, sizes)
    torch.ops.lorafx.run_delta_(y, x, *bank, rows, kernel)
    return y


def dense_mm_delta_fake(x, weight, sizes, bank: BankArgs, rows, kernel) -> Tensor:
    check_bank("dense_mm_delta", bank)
    y = dense_mm_fake(x, weight, sizes)
    check_rows("dense_mm_delta", x.shape[:-1], y.shape[:-1], rows)
    return y


def dense_addmm_delta_fake(bias, x, weight, sizes, bank: BankArgs, rows, kernel) -> Tensor:
    check_bank("dense_addmm_delta", bank)
    y = dense_addmm_fake(bias, x, weight, sizes)
    check_rows("dense_addmm_delta", x.shape[:-1], y.shape[:-1], rows)
    return y


_SCHEMA = f"Tensor x, Tensor weight, int[] sizes, {BANK}, SymInt rows, int kernel"
define(f"dense_mm_delta({_SCHEMA}) -> Tensor", dense_mm_delta, dense_mm_delta_fake)
define(
    f"dense_addmm_delta(Tensor bias, {_SCHEMA}) -> Tensor",
    dense_addmm_delta,
    dense_addmm_delta_fake,
)
DENSE_MM_DELTA = torch.ops.lorafx.dense_mm_delta.default
DENSE_ADDMM_DELTA = torch.ops.lorafx.dense_addmm_delta.default
