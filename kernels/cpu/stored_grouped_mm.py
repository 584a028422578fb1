"""`lorafx::stored_grouped_mm`, the product of rows, sorted by expert, with quantised experts.

    y[m] = W_e x[m]    for offs[e - 1] ≤ m < offs[e],    0 behind the last

    affine            parts q, scale and maybe zero: W = (q − zero) · scale of its block, where
                      scale and zero have a dimension for each of q's, which it divides
    nf4/b, fp4/b      parts q, two numbers a byte, and absmax: W = code[q] · absmax of its b numbers
    nf4/b/c, fp4/b/c  parts q, a, offset, code' and absmax': absmax = code'[a] · absmax' of its c
                      numbers + offset

Only experts with rows are read, at their stored width: int8 numbers by generated kernels, all
others by dequantising the W of one expert after another. The host waits for offs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.grouped_mm import GENERATED, MANY_ROWS, ProductSpec, groups_of, run
from lorafx.kernels.cpu.weight_mm import WEIGHT_MM
from lorafx.kernels.cpu.weight_source import LONGEST_STEP
from lorafx.kernels.ops.op_library import define, require

AFFINE = "affine"
#: Formats of bitsandbytes, whose operator dequantises them.
FOUR_BITS = ("nf4", "fp4")
Parts = Sequence[Tensor]
Sizes = Sequence[int]


def stored_grouped_mm(
    x: Tensor, weight: Parts, offs: Tensor, form: str, sizes: Sizes, turned: bool
) -> Tensor:
    """y (M, N) in the dtype of x (M, K), sorted by expert. `weight` are the parts of W, stored with
    `sizes` (E, N, K), or (E, K, N) if `turned`, in `form`; offs, int32 (E,), the ends of the
    experts' rows. Raises LoweringError for an end behind the last row, or an unknown format."""
    y = stored_grouped_mm_fake(x, weight, offs, form, sizes, turned)
    x, groups = x.contiguous(), groups_of("stored_grouped_mm", offs, len(x))
    y[groups[-1][1] if groups else 0 :].zero_()
    if form == AFFINE and not turned and _by_one_kernel(y, x, weight, offs):
        return y
    for expert, (start, end) in enumerate(groups):
        if end > start:
            y[start:end] = _product(x[start:end], weight, expert, form, sizes, turned)
    return y


def stored_grouped_mm_fake(
    x: Tensor, weight: Parts, offs: Tensor, form: str, sizes: Sizes, turned: bool
) -> Tensor:
    op, parts, (kind, *blocks) = "stored_grouped_mm", len(weight), form.split("/")
    whole = x.dim() == 2 and len(sizes) == 3 and parts > 1
    require(op, whole, "input is (M, K), sizes are of (E, N, K), weight has two parts or more")
    N, K = sizes[:0:-1] if turned else sizes[1:]
    require(op, x.shape[1] == K, f"input has {x.shape[1]} columns, weight has {K}")
    require(op, offs.shape == (sizes[0],), f"offs is (E,), not {tuple(offs.shape)}")
    require(op, offs.dtype == torch.int32, f"offs is int32, not {offs.dtype}")
    if kind == AFFINE:
        fits = parts < 4 and weight[0].shape == tuple(sizes)
        for table in weight[1:]:
            blocked = zip(sizes, table.shape, strict=False)
            fits = fits and table.dim() == 3 and not any(n % max(part, 1) for n, part in blocked)
    else:
        fits = kind in FOUR_BITS and (len(blocks), parts) in ((1, 2), (2, 5))
    require(op, fits, f"no format {form} of {parts} parts, {tuple(weight[0].shape)} first")
    return x.new_empty(x.shape[0], N)


def _by_one_kernel(y: Tensor, x: Tensor, parts: Parts, offs: Tensor) -> bool:
    """Whether a generated kernel computes y, in one parallel region: of int8 numbers with a scale
    for each output, and few rows."""
    (q, scale, *zero), (E, N, K) = parts, parts[0].shape
    known = q.dtype == torch.int8 and q.is_contiguous() and x.device.type == "cpu"
    if not known or scale.shape not in ((E, N, 1), (1, N, 1)) or len(x) >= MANY_ROWS * E:
        return False
    if any(bool(table.any()) for table in zero):
        return False
    kernel = GENERATED.ready(ProductSpec(torch.float32, K, N, stored=True))
    if kernel is not None:
        exact = y if y.dtype == torch.float32 else torch.zeros_like(y, dtype=torch.float32)
        scales = scale.float().expand(E, N, 1).contiguous()
        run(exact, x.float(), q, offs, *kernel, scales)
        y.copy_(exact)
    return kernel is not None


def _product(x: Tensor, parts: Parts, e: int, form: str, sizes: Sizes, turned: bool) -> Tensor:
    """The product with one expert's W."""
    if form != AFFINE:
        W = _of_four_bits(parts, e, form, sizes, x.dtype)
        return x @ (W if turned else W.T)
    q, scale, *others = (part[e * part.shape[0] // sizes[0]] for part in parts)
    zero = others[0] if others and bool(others[0].any()) else None
    (n, k), (rows, columns) = q.shape, scale.shape
    whole_steps = columns == 1 or k // columns % LONGEST_STEP == 0
    if not turned and q.dtype == torch.int8 and rows in (1, n) and whole_steps:
        tables = (None if t is None else t.expand(n, -1).contiguous() for t in (scale, zero))
        y: Tensor = WEIGHT_MM(x, q, None, None, *tables)
        return y
    blocks = q.float().reshape(rows, n // rows, columns, k // columns)
    blocks = blocks if zero is None else blocks - zero.float()[:, None, :, None]
    W = (blocks * scale.float()[:, None, :, None]).reshape(n, k).to(x.dtype)
    return x @ (W if turned else W.T)


def _of_four_bits(parts: Parts, e: int, form: str, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """One expert's W, of which the first and the last block may be its neighbours', too."""
    kind, (block, *outer) = form.split("/")[0], map(int, form.split("/")[1:])
    (q, absmax, *nested), count = parts, sizes[1] * sizes[2]
    first, last = e * count // block, -(-(e + 1) * count // block)
    scales = absmax[first:last]
    if nested:
        offset, code, scale = nested
        places = torch.arange(first, last, device=q.device) // outer[0]
        scales = code[scales.int()] * scale[places] + offset
    data = q.view(torch.uint8).flatten()[first * block // 2 : last * block // 2]
    dequantised: Any = torch.ops.bitsandbytes.dequantize_4bit
    W: Tensor = dequantised(data, scales.float(), block, kind, [2 * len(data)], dtype)
    return W.flatten()[e * count - first * block :][:count].view(sizes[1], sizes[2])


_SCHEMA = (
    "stored_grouped_mm(Tensor input, Tensor[] weight, Tensor offs, str format, int[] sizes, "
    "bool transposed) -> Tensor"
)
define(_SCHEMA, stored_grouped_mm, stored_grouped_mm_fake)
STORED_GROUPED_MM = torch.ops.lorafx.stored_grouped_mm.default
