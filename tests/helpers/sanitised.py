"""A plugin with which generated kernels are compiled to report accesses outside of memory and
undefined behaviour: `make sanitised`, which loads the sanitisers' libraries into Python first."""

from __future__ import annotations

from lorafx.kernels.cpu import compiler

compiler.BASE_FLAGS = (
    *(flag for flag in compiler.BASE_FLAGS if flag != "-O3"),
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)
