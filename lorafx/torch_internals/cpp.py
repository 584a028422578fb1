"""The C++ compiler that Inductor has found, and its folder."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir
