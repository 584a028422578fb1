"""Which instructions of the CPU torch has found."""

from __future__ import annotations

import functools

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch.cpu import (
        _init_amx,
        _is_amx_tile_supported,
        _is_avx512_bf16_supported,
        _is_vnni_supported,
    )


def has_avx512_bf16() -> bool:
    """Whether it multiplies bfloat16, and bytes (VNNI), in vectors."""
    return _is_avx512_bf16_supported() and _is_vnni_supported()


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether it multiplies bfloat16 in matrix tiles (AMX), and the system, asked here once and for
    all, lets this process use them."""
    return _is_amx_tile_supported() and _init_amx()
