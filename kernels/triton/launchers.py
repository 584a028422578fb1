"""How a generated kernel is run over a grid: compiled on a device, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.library import wrap_triton

from lorafx.kernels.triton.triton_cache import GeneratedKernel
from lorafx.torch_internals.triton_compat import interpret, launches_directly

#: Runs a kernel over a grid, with these arguments.
Launch = Callable[[GeneratedKernel, Sequence[Any], Sequence[Any]], None]


def launch_wrapped(kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Launches on the arguments' device, or adds the launch to the graph that is traced."""
    options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
    # in a graph, lorafx.torch_internals.inductor_wrapper sees to it
    if launches_directly() and kernel.starts_early:
        options["launch_pdl"] = True
    wrap_triton(kernel.jit)[tuple(grid)](*arguments, **options)


def launch_interpreted(
    kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]
) -> None:
    """Runs the kernel in Triton's interpreter."""
    interpret(kernel.jit, grid, arguments)
