"""What a graph will ask for, compiled while it is still being traced.

    compile_ahead(foreseen)    the libraries of these kernels, and of the ops that call them

Nothing is loaded here: a library that nobody asks for has cost its compilation and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compilations import ahead
from lorafx.kernels.cpu.compiler import (
    Isa,
    best_isa,
    cache_folder,
    compile_library,
    find_compiler,
)
from lorafx.kernels.cpu.cpu import DISPATCHER
from lorafx.kernels.cpu.cpu_source import ELEMENTS, flags_of, source
from lorafx.kernels.cpu.dense import DENSE_OPS, generates
from lorafx.kernels.cpu.dense_source import dense_source
from lorafx.kernels.cpu.native_ops import op_source
from lorafx.kernels.cpu.product_source import ProductSpec, product_source
from lorafx.kernels.ops.delta_spec import DeltaSpec


@dataclass(frozen=True)
class Foreseen:
    """Kernels that a graph is expected to ask for.

    Attributes:
        deltas: of LoRA.
        products: of sorted rows with the weights of experts.
        dense: types of linears, whose products are kernels too.

    None of them need be different.
    """

    deltas: Iterable[DeltaSpec] = ()
    products: Iterable[ProductSpec] = ()
    dense: Iterable[torch.dtype] = ()


def compile_ahead(foreseen: Foreseen) -> None:
    """Have the kernels compiled in the background, and what calls them."""
    tasks = list(_tasks(foreseen))
    if not tasks:
        return
    try:
        # Two threads that import the same modules may each see the other's half made.
        find_compiler()
        cache_folder()
    except (LoweringError, OSError):
        return  # told where a kernel is asked for
    ahead(tasks)


def _tasks(foreseen: Foreseen) -> Iterator[Callable[[], object]]:
    deltas = [spec for spec in dict.fromkeys(foreseen.deltas) if spec.supported()]
    dense = [dtype for dtype in dict.fromkeys(foreseen.dense) if dtype in ELEMENTS]
    for spec in deltas:
        yield partial(_compile, partial(source, spec), flags=flags_of)
    for product in dict.fromkeys(foreseen.products):
        yield partial(_compile, partial(product_source, product))
    if deltas:
        yield partial(compile_library, op_source(DISPATCHER), wait=False)
    for dtype in dense:
        yield partial(_compile, partial(dense_source, dtype), generates)
    if dense:
        yield partial(compile_library, op_source(DENSE_OPS), wait=False)


def _compile(
    text: Callable[[Isa], str],
    wanted: Callable[[Isa], bool] = lambda isa: True,
    flags: Callable[[Isa], tuple[str, ...]] = lambda isa: isa.flags,
) -> None:
    isa = best_isa()
    if wanted(isa):
        compile_library(text(isa), flags(isa), wait=False)
