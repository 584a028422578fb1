"""The C++ compiler that Inductor has found, and its folder."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="generated kernels are compiled by the compiler that Inductor uses, into its cache",
    ended_by="a public name for Inductor's compiler and cache folder",
    refused='lowering="inductor" on a CPU',
)

with private_names():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir
