"""How generated kernels are run, and how ops of them are defined.

lorafx::triton_<name>         a `triton_op`: AOTAutograd replaces it by its launches, which
                              Inductor then compiles as its own, CUDA graphs capture, and
                              ahead-of-time packages contain
lorafx::interpreted_<name>    opaque: on a CPU there is nothing to launch on, so the other calls
                              this op, which runs the same kernels in Triton's interpreter
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.library import custom_op, wrap_triton

from lorafx.kernels.ops.op_library import flat
from lorafx.kernels.triton.generated import GeneratedKernel
from lorafx.torch_internals.triton_compat import generated_triton_op, interpret, launches_directly

#: Runs a kernel over a grid, with these arguments.
Launch = Callable[[GeneratedKernel, Sequence[Any], Sequence[Any]], None]


def launch_wrapped(kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
    options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
    # In a graph, lorafx.torch_internals.inductor_wrapper arranges it.
    if launches_directly() and kernel.starts_early:
        options["launch_pdl"] = True
    wrap_triton(kernel.jit)[tuple(grid)](*arguments, **options)


def launch_interpreted(
    kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]
) -> None:
    interpret(kernel.jit, grid, arguments)


def generated_op(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates_args: Sequence[str] = (),
) -> Any:
    """`lorafx::triton_<name>` of `run`, whose last argument is the launcher, and first a tensor."""
    launched = flat(run)
    signature = inspect.signature(launched)
    *parameters, _ = signature.parameters.values()

    def interpreted(*arguments: Any) -> Any:
        return launched(*arguments, launch_interpreted)

    def traced(*arguments: Any) -> Any:
        first = arguments[0]
        device = first.device if isinstance(first, Tensor) else first[0].device
        if device.type == "cpu":
            return opaque(*arguments)
        return launched(*arguments, launch_wrapped)

    for function in (interpreted, traced):
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        function.__doc__ = run.__doc__
    opaque = custom_op(f"lorafx::interpreted_{name}", interpreted, mutates_args=mutates_args)
    op = generated_triton_op(f"lorafx::triton_{name}", mutates_args=mutates_args)(traced)
    for defined in (op, opaque):
        defined.register_fake(flat(fake))
    return op
