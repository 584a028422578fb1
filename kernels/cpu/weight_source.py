"""The text of a generated kernel of `lorafx::weight_mm` for few rows, and what it is generated for.

source(spec, isa) = #defines and constants of spec
                    + vectors.h + epilogue.h + dense_args.h + dense_call.h
                    + one of   planes.h + dense_rows.h           vectors
                               amx.h + matrix_tiles.h            matrix tiles
                               [amx.h +] packed.h + dense_rows.h packed integers, by both
                    + [digits.h] + dense.cpp
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    INTEGERS,
    SERIAL_WORK,
    Key,
    dtype_code,
    dtype_of,
    kernel_source,
)
from lorafx.torch_internals.graph_parts import unset_fake_temporarily

aten = torch.ops.aten

#: Bytes of W in a unit of work, which stay in a cache of the core for later tiles of rows.
UNIT_BYTES = 1 << 18
#: Columns of y per step of an epilogue; 64 to 1024 are as good (Zen 4, 16 rows, float32).
EPILOGUE_COLUMNS = 256
#: How often a thread checks whether the others are done before it yields.
SPINS = 1 << 10
#: Elements of the longest step of a generated kernel, which no group may cut.
LONGEST_STEP = 32
#: The dtype of bytes that hold two integers each.
PACKED = torch.uint8


@dataclass(frozen=True)
class WeightSpec:
    """What a kernel is generated for: the dtypes of x, of W or its integers, of scale and zero, and
    whether the last two are applied to each number, not to y."""

    dtype: torch.dtype
    weight: torch.dtype
    scale: torch.dtype | None = None
    zero: torch.dtype | None = None
    grouped: bool = False

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> WeightSpec | None:
        """None if no kernel is generated; the tensors may be fake."""
        if scale is None:
            return cls(x.dtype, weight.dtype)._if_generated()
        grouped = zero is not None or scale.dim() == 3 or scale.shape[1] > 1
        dtypes = x.dtype, weight.dtype, scale.dtype, None if zero is None else zero.dtype
        return cls(*dtypes, grouped)._if_generated()

    def _if_generated(self) -> WeightSpec | None:
        integers = self.weight in INTEGERS or (self.weight == PACKED and packed_block() > 0)
        known = integers if self.scale else self.weight == self.dtype
        zeros = {None, *ELEMENTS, *INTEGERS}
        floats = {self.dtype, self.scale or self.dtype} <= ELEMENTS.keys()
        return self if known and floats and self.zero in zeros else None

    @property
    def key(self) -> Key:
        """The key by which weight_op.cpp finds the kernel."""
        tables = (
            0 if dtype is None else dtype_code(dtype) + 1 for dtype in (self.scale, self.zero)
        )
        return dtype_code(self.dtype), dtype_code(self.weight), *tables, int(self.grouped)

    @classmethod
    def of_key(cls, key: Key) -> WeightSpec | None:
        dtype, weight, scale, zero = map(dtype_of, (*key[:2], key[2] - 1, key[3] - 1))
        if dtype is None or weight is None:
            return None
        return cls(dtype, weight, scale, zero, bool(key[4]))._if_generated()


@functools.cache
def packed_block() -> int:
    """The rows of a block in the layout into which torch packs integers of four bits in this
    process; 0 if packed.h does not read it."""
    with unset_fake_temporarily():
        for block in (64, 32):
            q = torch.arange(2 * block, dtype=torch.int32).pow(2).remainder(13).view(block, 2)
            lines = (q[: block // 2] | q[block // 2 :] << 4).T
            packed = aten._convert_weight_to_int4pack_for_cpu(q, 1)
            if torch.equal(packed.view(lines.shape), lines.to(PACKED)):
                return block
    return 0


def source(spec: WeightSpec, isa: Isa) -> str:
    is_packed, is_stored = spec.weight == PACKED, spec.scale is not None and spec.weight != PACKED
    elements: dict[Any, str] = {**ELEMENTS, **INTEGERS}
    defines: dict[str, object] = {"PACKED": int(is_packed), "STORED": int(is_stored)}
    # Converting x once takes less time than converting it for each column.
    step = ELEMENTS[spec.dtype] if isa.dpbf16 and spec.dtype != torch.float16 else "F32"
    matrix = isa.matrix_tiles and step == "BF16" and (not is_packed or packed_block() == 64)
    if is_packed:
        defines |= {"BLOCK": packed_block(), "S": elements[spec.scale]}
    else:
        defines |= {"GROUPED": int(spec.grouped)}
    if is_stored:
        defines |= {"HAS_ZERO": int(spec.zero is not None), "W": elements[spec.weight]}
        defines |= {"S": elements[spec.scale], "Z": elements[spec.zero or spec.weight]}
    # Eight rows: tiles of eight take 0.8 to 0.93 (float32), 0.9 (bfloat16) and 0.76 (int8) of six
    # and two, but 1.07 where integers become float32 (Zen 4, cold weights). With 16 registers two
    # of four in turn take 0.75 to 0.8 of one by one (Zen 3).
    tile = 4 if isa.lanes < 16 else 6 if is_stored and step == "F32" else 16 if matrix else 8
    sizes = {
        "TILE": tile,
        "BLOCK_ROWS": 4 * tile if isa.lanes == 8 and not is_packed else tile,
        "ACCUMULATORS": 24 if isa.lanes == 16 else 12,
        "STREAMS": isa.streams,
        "LOCALITY": isa.locality,
        "UNIT_BYTES": UNIT_BYTES,
        "SERIAL_WORK": SERIAL_WORK,
        "EPILOGUE_COLUMNS": EPILOGUE_COLUMNS,
        "SPINS": SPINS,
    }
    bytewise = packed_block() == 64 if is_packed else is_stored and not spec.grouped
    digits = bytewise and isa.dpbf16 and spec.dtype.itemsize == 2
    defines |= {"DIGITS": int(digits)}
    defines |= {"E": step, "WIDENED": int(step != ELEMENTS[spec.dtype]), "MATRIX": int(matrix)}
    defines |= {"SPLIT": int(spec.weight == torch.bfloat16 and step == "F32")}
    tiles = "packed.h" if is_packed else "matrix_tiles.h" if matrix else "planes.h"
    heads = ["vectors.h", "epilogue.h", "dense_args.h", "dense_call.h", *["amx.h"] * matrix]
    layout = [] if tiles == "matrix_tiles.h" else ["dense_rows.h"]
    files = [*heads, tiles, *layout, *["digits.h"] * digits, "dense.cpp"]
    return kernel_source(spec, isa, (spec.dtype,) * 3, sizes, files, defines)
