"""Generated kernels as a GPU would launch them, run from their PTX on a CPU (ptx_machine)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from compile_only_gpu import compile_only_gpu
from ptx_machine import Memory, run
from torch import Tensor
from triton_cases import LINEAR, Case

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.triton.strategy_tiles import tiles_for
from lorafx.kernels.triton.triton_build import build
from lorafx.kernels.triton.triton_cache import GeneratedKernel
from lorafx.kernels.triton.triton_ops import _run_delta, _run_linear
from lorafx.kernels.triton.triton_tiles import Tiles, architecture_of

CUDA = torch.device("cuda", 0)
Launch = Callable[[GeneratedKernel, Sequence[Any], Sequence[Any]], None]


def launch(kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Has Triton compile the kernel for these very arguments, as a launch would, and runs that."""
    options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
    compiled = kernel.jit.warmup(*arguments, grid=tuple(grid), **options)
    launch_ptx(compiled.asm["ptx"], kernel.jit.arg_names, grid, arguments)


def launch_ptx(
    ptx: str, names: Sequence[str], grid: Sequence[Any], arguments: Sequence[Any]
) -> None:
    """Runs PTX that was compiled for arguments like these: those that are 1 are constants."""
    memory, passed = Memory(), []
    for name, argument in zip(names, arguments, strict=True):
        if isinstance(argument, Tensor):
            passed.append(memory.hold(name, argument))
        elif isinstance(argument, float):
            passed.append(int(np.float32(argument).view(np.uint32)))
        elif argument != 1:
            passed.append(int(argument))
    run(ptx, passed, [int(size) for size in grid], memory)


def run_on_ptx(
    case: Case,
    strategy: str,
    tiles: Mapping[str, Tiles] | None = None,
    launch: Launch = launch,
) -> Tensor:
    """y of the case by the strategy's kernels for Hopper; its y is written by those that add."""
    p = case.problem
    with compile_only_gpu():
        if tiles is None:
            tiles = tiles_for(strategy, case.spec.delta, p.x.shape[0], architecture_of(CUDA))
        kernel = build(case.spec, strategy, rows_hint=p.x.shape[0], device=CUDA, tiles=tiles)
        assert kernel is not None
        bank = BankArgs(*p.bank)
        if strategy in LINEAR:
            return _run_linear(p.x, case.weight, case.bias, bank, p.rows, kernel, launch)
        _run_delta(p.y, p.x, bank, p.rows, kernel, launch)
        return p.y
