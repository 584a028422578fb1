"""`lorafx::stored_grouped_mm`, the product of rows, sorted by expert, with quantised experts.

    y[m] = W_e x[m]    for offs[e - 1] ≤ m < offs[e],    0 behind the last

    affine            parts q, scale and maybe zero: W = (q − zero) · scale of its block, where
                      scale and zero have a dimension for each of q's, which it divides
    nf4/b, fp4/b      parts q, two numbers a byte, and absmax: W = code[q] · absmax of its b numbers
    nf4/b/c, fp4/b/c  parts q, a, offset, code' and absmax': absmax = code'[a] · absmax' of its c
                      numbers + offset

Only experts with rows are read, at their stored width: int8 numbers by the generated kernels of
`weight_mm`, all others by dequantising the W of one expert after another. The host waits for offs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.grouped_mm import GENERATED, MANY_ROWS, ProductSpec, groups_of, run
from lorafx.kernels.cpu.weight_mm import LONGEST_STEP, WEIGHT_MM
from lorafx.kernels.ops.op_library import define, require

AFFINE = "affine"
#: Formats of bitsandbytes, whose operators dequantise them.
FOUR_BITS = ("nf4", "fp4")


def stored_grouped_mm(
    x: Tensor, weight: Sequence[Tensor], offs: Tensor, form: str, sizes: Sequence[int], turned: bool
) -> Tensor:
    """y (M, N) in the dtype of x (M, K), sorted by expert. `weight` are the parts of W, stored with
    `sizes` (E, N, K), or (E, K, N) if `turned`, in `form`; offs, int32 (E,), the ends of the
    experts' rows. Raises LoweringError for an end behind the last row, or an unknown format."""
    y = stored_grouped_mm_fake(x, weight, offs, form, sizes, turned)
    x, groups = x.contiguous(), groups_of("stored_grouped_mm", offs, len(x))
    y[groups[-1][1] if groups else 0 :].zero_()
    if _by_one_kernel(y, x, weight, offs, form, turned):
        return y
    for expert, (start, end) in enumerate(groups):
        if end > start:
            y[start:end] = _product(x[start:end], weight, expert, form, sizes, turned)
    return y


def stored_grouped_mm_fake(
    x: Tensor, weight: Sequence[Tensor], offs: Tensor, form: str, sizes: Sequence[int], turned: bool
) -> Tensor:
    op, parts = "stored_grouped_mm", len(weight)
    kind, *blocks = form.split("/")
    whole = x.dim() == 2 and len(sizes) == 3 and parts > 1
    require(op, whole, "input is (M, K), sizes are of (E, N, K), weight has two parts or more")
    N, K = sizes[:0:-1] if turned else sizes[1:]
    require(op, x.shape[1] == K, f"input has {x.shape[1]} columns, weight has {K}")
    require(op, offs.shape == (sizes[0],), f"offs is (E,), not {tuple(offs.shape)}")
    require(op, offs.dtype == torch.int32, f"offs is int32, not {offs.dtype}")
    if kind == AFFINE:
        fits = parts in (2, 3) and weight[0].shape == tuple(sizes)
        fits = fits and all(_divides(table.shape, sizes) for table in weight[1:])
    else:
        fits = kind in FOUR_BITS and (len(blocks), parts) in ((1, 2), (2, 5))
    require(op, fits, f"no format {form} of {parts} parts, {tuple(weight[0].shape)} first")
    return x.new_empty(x.shape[0], N)


def _divides(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    return len(shape) == 3 and all(
        n % max(part, 1) == 0 for n, part in zip(sizes, shape, strict=True)
    )


def _by_one_kernel(
    y: Tensor, x: Tensor, parts: Sequence[Tensor], offs: Tensor, form: str, turned: bool
) -> bool:
    """Whether a generated kernel computes y, in one parallel region: of int8 numbers with a scale
    for each output, and few rows."""
    q, scale, *zero = parts
    if form != AFFINE or q.dtype != torch.int8 or turned or x.device.type != "cpu":
        return False
    (E, N, K), few = q.shape, len(x) < MANY_ROWS * len(offs) and q.is_contiguous()
    if not few or scale.shape[1:] != (N, 1) or any(bool(table.any()) for table in zero):
        return False
    kernel = GENERATED.ready(ProductSpec(torch.float32, K, N, stored=True))
    if kernel is None:
        return False
    exact = y if y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    scales = scale.float().expand(E, N, 1).contiguous()
    run(exact, x.float(), q, offs, *kernel, scales)
    if exact is not y:
        rows = int(offs[-1])
        y[:rows] = exact[:rows]
    return True


def _product(
    x: Tensor, parts: Sequence[Tensor], expert: int, form: str, sizes: Sequence[int], turned: bool
) -> Tensor:
    kind, *blocks = form.split("/")
    if kind != AFFINE:
        W = _of_four_bits(parts, expert, kind, [*map(int, blocks)], sizes, x.dtype)
        return x @ (W if turned else W.T)
    q, scale, *others = (part[expert * part.shape[0] // sizes[0]] for part in parts)
    zero = others[0] if others and bool(others[0].any()) else None
    if not turned and q.dtype == torch.int8:
        (N, K), (rows, groups) = q.shape, scale.shape
        if rows in (1, N) and (groups == 1 or K // groups % LONGEST_STEP == 0):
            tables = (None if t is None else t.expand(N, -1).contiguous() for t in (scale, zero))
            y: Tensor = WEIGHT_MM(x, q, None, None, *tables)
            return y
    W = widened_blocks(q, scale, zero).to(x.dtype)
    return x @ (W if turned else W.T)


def widened_blocks(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """W, float32, for q (n, k), where scale and zero have an entry for each block."""
    (n, k), (rows, columns) = q.shape, scale.shape
    blocks = q.float().reshape(rows, n // rows, columns, k // columns)
    if zero is not None:
        blocks = blocks - zero.float()[:, None, :, None]
    return (blocks * scale.float()[:, None, :, None]).reshape(n, k)


def _of_four_bits(
    parts: Sequence[Tensor],
    expert: int,
    kind: str,
    blocks: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """One expert's W, of which the first and the last block may be its neighbours', too."""
    q, absmax, *nested = parts
    count, block = sizes[1] * sizes[2], blocks[0]
    first, last = expert * count // block, -(-(expert + 1) * count // block)
    scales = absmax[first:last]
    if nested:
        offset, code, outer = nested
        places = torch.arange(first, last, device=q.device) // blocks[1]
        scales = code[scales.int()] * outer[places] + offset
    data = q.view(torch.uint8).flatten()[first * block // 2 : last * block // 2]
    four_bits: Any = torch.ops.bitsandbytes.dequantize_4bit
    W: Tensor = four_bits(data, scales.float(), block, kind, [2 * len(data)], dtype).flatten()
    return W[expert * count - first * block :][:count].view(sizes[1], sizes[2])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, offs, *ctx.form = inputs
    ctx.save_for_backward(offs, *weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x alone: the product with the transposed weights."""
    (offs, *weight), (form, sizes, turned) = ctx.saved_tensors, ctx.form
    return STORED_GROUPED_MM(grad, weight, offs, form, sizes, not turned), *(None,) * 5


_SCHEMA = (
    "stored_grouped_mm(Tensor input, Tensor[] weight, Tensor offs, str format, int[] sizes, "
    "bool transposed) -> Tensor"
)
define(_SCHEMA, stored_grouped_mm, stored_grouped_mm_fake, _gradients, _save_for_backward)
STORED_GROUPED_MM = torch.ops.lorafx.stored_grouped_mm.default
