"""What need not wait for a graph, done while the model is traced.

Inductor finds out about the machine once a process. It compiles a few lines for each instruction
set that the CPU has, and loads them: nine seconds from empty caches, one from full ones, nearly all
of it in other processes. It also hashes all of Triton for the key of its caches, without a GPU too.
Neither depends on the model, so a thread does it while Dynamo and AOTAutograd run, and Inductor
finds the results where it keeps them itself.

lorafx's own kernels on a CPU follow from the model's sites, and from what these read in Dynamo's
graph. Compilers run for them in the background, and the passes find the libraries in their cache.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref

import torch
from torch import fx

from lorafx.kernels.cpu.compile_ahead import compile_ahead
from lorafx.passes.plan.foreseen import before_tracing, in_captured
from lorafx.program.frame import Frame
from lorafx.program.program import Program

#: Programs whose kernels were begun.
_BEGUN: weakref.WeakSet[Program] = weakref.WeakSet()
_started: threading.Thread | None = None


def begin() -> None:
    """Start, if that was not done in this process. It calls nothing but torch's own functions, by
    the settings that hold here."""
    global _started
    # The probe of that instruction set changes its flags for a moment, which another thread that
    # compiles something might see.
    supported = getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)
    if _started is not None or supported():
        return
    # Two threads that import the same modules may each see the other's half made.
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401
    from torch._inductor.runtime import triton_compat  # noqa: F401
    from torch.utils import cpp_extension  # noqa: F401

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_find_out,), daemon=True)
    with contextlib.suppress(RuntimeError):  # the process may have no more threads
        thread.start()
        _started = thread


def compile_kernels(program: Program) -> None:
    """Start with the kernels that any graph of `program` will ask for, once for each program."""
    if program not in _BEGUN:
        _BEGUN.add(program)
        compile_ahead(before_tracing(program))


def compile_kernels_of(program: Program, frame: Frame, graph: fx.Graph) -> None:
    """Start with those that a graph of Dynamo's will ask for beside them."""
    compile_ahead(in_captured(program, frame, graph))


def wait() -> None:
    """Until what was begun is there. Torch's own functions are not made for two threads."""
    if _started is not None:
        _started.join()


def _find_out() -> None:
    from torch._inductor import codecache, cpu_vec_isa

    # What fails here fails again where Inductor needs it, which is where it is told.
    for function in (cpu_vec_isa.pick_vec_isa, codecache.CacheBase.get_system):
        with contextlib.suppress(Exception):
            function()
