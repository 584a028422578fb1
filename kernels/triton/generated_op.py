"""How an op of generated Triton kernels is defined: as two, which AOTAutograd and a CPU need.

lorafx::triton_<name>         a `triton_op`: AOTAutograd replaces it by its launches, which
                              Inductor then compiles as its own, CUDA graphs capture, and
                              ahead-of-time packages contain
lorafx::interpreted_<name>    opaque: on a CPU there is nothing to launch on, so the other calls
                              this one, which runs the same kernels in Triton's interpreter
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.library import custom_op

from lorafx.kernels.ops.flat_arguments import flat
from lorafx.kernels.triton.launchers import launch_interpreted, launch_wrapped
from lorafx.torch_internals.triton_compat import generated_triton_op


def generated_op(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates_args: Sequence[str] = (),
) -> Any:
    """`lorafx::triton_<name>`, which does as `run`, whose last argument is the launcher.

    The schema is that of `run` without it; the first argument, or the first in it, is a tensor.
    """
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
    for each in (op, opaque):
        each.register_fake(flat(fake))
    return op
