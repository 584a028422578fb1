"""Generated Triton kernels: an importable Python file for each, how they run, and ops of them.

    file = cache / triton / <kernel>_<key>.py
    key  = sha256(kernel, spec, tiles, architecture, templates, versions of triton and torch)

Triton, tracebacks and dumps read a kernel's text through `inspect`, so it has to be a file. A
process that finds the file imports it. Files are renamed into place when they are complete.

    lorafx::triton_<name>         a `triton_op`: AOTAutograd replaces it by its launches, which
                                  Inductor then compiles as its own, CUDA graphs capture, and
                                  ahead-of-time packages contain
    lorafx::interpreted_<name>    opaque: on a CPU there is nothing to launch on, so the other calls
                                  this op, which runs the same kernels in Triton's interpreter
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.library import custom_op, wrap_triton

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.ops.op_library import flat
from lorafx.kernels.triton.source import KERNELS, Spec, generator_hash, source
from lorafx.kernels.triton.tiles import Architecture, Tiles
from lorafx.torch_internals import triton_compat
from lorafx.torch_internals.versions import check_triton

#: Kernels that launch first and whose result another kernel reads.
FIRST = ("shrink", "shrink_rows", "split")


@dataclass(frozen=True, eq=False)
class GeneratedKernel:
    """A kernel of this process and its @triton.jit function. Equal keys mean equal text."""

    name: str
    key: str
    path: Path
    tiles: Tiles
    jit: Any = field(repr=False)

    @property
    def starts_early(self) -> bool:
        """Whether it may be launched while the kernel before it runs: it waits by itself."""
        return self.tiles.overlap and self.name not in FIRST

    @property
    def text(self) -> str:
        return self.path.read_text()


def key_of(kernel: str, spec: Spec | None, tiles: Tiles, arch: Architecture) -> str:
    parts = (
        *(kernel, repr(spec), repr(tiles), arch.name),
        *(generator_hash(), triton_compat.version(), torch.__version__),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def load(kernel: str, spec: Spec | None, tiles: Tiles, arch: Architecture) -> GeneratedKernel:
    check_triton()
    key = key_of(kernel, spec, tiles, arch)
    folder = cache_folder() / "triton"
    path = folder / f"{kernel}_{key}.py"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=".", suffix=".tmp", delete=False, encoding="utf-8"
        ) as scratch:
            scratch.write(source(kernel, spec, tiles))
        os.replace(scratch.name, path)
    template, constants = KERNELS[kernel]
    function = constants.get("function", template)
    return GeneratedKernel(kernel, key, path, tiles, getattr(_import(path), function))


def _import(path: Path) -> ModuleType:
    name = f"lorafx_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise LoweringError(f"the generated kernel {path} cannot be imported: {error}") from error
    return module


#: Runs a kernel over a grid, with these arguments.
Launch = Callable[[GeneratedKernel, Sequence[Any], Sequence[Any]], None]


def launch_wrapped(kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
    options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
    # In a graph, lorafx.torch_internals.inductor arranges it.
    if triton_compat.launches_directly() and kernel.starts_early:
        options["launch_pdl"] = True
    wrap_triton(kernel.jit)[tuple(grid)](*arguments, **options)


def launch_interpreted(
    kernel: GeneratedKernel, grid: Sequence[Any], arguments: Sequence[Any]
) -> None:
    triton_compat.interpret(kernel.jit, grid, arguments)


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
        if arguments[0].device.type == "cpu":
            return opaque(*arguments)
        return launched(*arguments, launch_wrapped)

    for function in (interpreted, traced):
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        function.__doc__ = run.__doc__
    opaque = custom_op(f"lorafx::interpreted_{name}", interpreted, mutates_args=mutates_args)
    op = triton_compat.generated_triton_op(f"lorafx::triton_{name}", mutates_args=mutates_args)(
        traced
    )
    for defined in (op, opaque):
        defined.register_fake(flat(fake))
    return op
