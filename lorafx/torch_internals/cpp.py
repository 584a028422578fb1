"""The C++ compiler that Inductor has found, its folder, and what it is asked before any kernel."""

from __future__ import annotations

import contextlib
import functools
import threading

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

#: The least that Inductor compiles as a kernel of its own.
_NO_KERNEL = 'extern "C" void kernel(float* x) {}'


@functools.cache
def ask_compiler() -> None:
    """Ask the C++ compiler, beside the calling thread and once in a process, what Inductor asks
    before its first kernel: which vector instructions it knows, and for a precompiled header. The
    answers are kept in Inductor's folder, and where one is not there yet, Inductor waits for it."""
    threading.Thread(target=_ask, name="lorafx: C++ compiler", daemon=True).start()


def _ask() -> None:
    with contextlib.suppress(Exception):  # the lowering meets it, and says so
        answer()


def answer() -> None:
    """Compile what Inductor asks before its first kernel."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    pick_vec_isa()
    CppPythonBindingsCodeCache.load_pybinding(["float*"], _NO_KERNEL)
