"""`lorafx::conv_site`, y + delta of a convolution.

    y[m] += scales[s] · B[s, :r]ᵀ · conv(x[m], A[s, :r])        s = slot of row m, r = ranks[s, 0]

x (M, C, D...), y (M, N, D'...) with one to three spatial dimensions; row m is index m of the first
dimension. A (S, R, C·∏kernel) holds kernels (C, kernel...) as rows: a low-rank convolution with the
base's stride and padding, behind which B (S, R, N) is a 1x1 convolution, as PEFT's LoRA has it
(peft.tuners.lora.layer._ConvNd): A sees all channels, whatever the base's groups are, and is not
dilated. `pads` are the zeros before and after each spatial dimension, first dimension first.

Sums are in float32 (float64 for float64 tensors), y is read and rounded once. On a CPU only rows of
slots that are present are computed. On an accelerator, where reading the slots would make the host
wait, each row gathers its A, and a single convolution with a group for each row computes all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafx.kernels.ops.delta import (
    accumulation_dtype,
    groups,
    rescaled_rows,
    row_slots,
    shifted_rows,
)
from lorafx.kernels.ops.op_library import (
    BANK,
    BankArgs,
    check_bank,
    check_by_column,
    check_rows,
    define,
    require,
)

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Window(NamedTuple):
    """How A's kernel moves over x: an entry for each spatial dimension, two of `pads`."""

    kernel: Sequence[int]
    stride: Sequence[int]
    pads: Sequence[int]


def conv_site(
    x: Tensor,
    y: Tensor,
    bank: BankArgs,
    rows: int,
    window: Window,
    gains: Tensor | None,
    addend: Tensor | None,
    shifts: Tensor | None,
) -> Tensor:
    """y (M, N, D'...) + delta, a new contiguous tensor. With `gains`, all of y but `addend` (N,) is
    rescaled afterwards; `shifts` are added last."""
    conv_site_fake(x, y, bank, rows, window, gains, addend, shifts)
    out = y.clone(memory_format=torch.contiguous_format)
    if out.numel():
        add_conv_delta(out, x, bank, rows, window)
    if gains is None and shifts is None:
        return out
    owner = row_slots(bank.slots, rows, len(y)).view(-1, *[1] * len(window.kernel))
    channels_last = out.movedim(1, -1)
    if gains is not None:
        channels_last = rescaled_rows(channels_last, gains, addend, owner)
    if shifts is not None:
        channels_last = shifted_rows(channels_last, shifts, owner)
    return channels_last.movedim(-1, 1).contiguous()


def conv_site_fake(x, y, bank: BankArgs, rows, window: Window, gains, addend, shifts):
    kernel, stride, pads = window
    op, dims = "conv_site", len(kernel)
    check_bank(op, bank)
    require(op, dims in _CONVOLUTIONS, f"a kernel of {dims} dimensions")
    require(op, x.dim() == y.dim() == dims + 2, f"x is {x.dim()}-d and y {y.dim()}-d")
    require(op, x.is_floating_point(), "x is a floating-point tensor")
    require(op, len(stride) == dims and len(pads) == 2 * dims, "stride or pads of other dimensions")
    check_rows(op, x.shape[:1], y.shape[:1], rows)
    size = x.shape[1] * math.prod(kernel)
    require(op, bank.A.shape[2] == size, f"A has {bank.A.shape[2]} entries a row, x needs {size}")
    require(op, bank.ranks.shape[1] == 1, "a convolution has no siblings")
    require(op, bank.B.shape[2] == y.shape[1], f"y has {y.shape[1]} channels, B {bank.B.shape[2]}")
    for d in range(dims):
        room = x.shape[2 + d] + pads[2 * d] + pads[2 * d + 1] - kernel[d]
        fits = room // stride[d] + 1 == y.shape[2 + d]
        require(op, fits, f"A's outputs have another size than y's {y.shape[2 + d]}")
    check_by_column(op, bank.B, gains=gains, shifts=shifts)
    return y.new_empty(y.shape)


def add_conv_delta(
    y: Tensor, x: Tensor, bank: BankArgs, rows: int, window: Window, *, by_slot: bool | None = None
) -> None:
    """Add the delta to contiguous y in place; `by_slot` overrides the choice by device."""
    A, B, ranks, scales, slots = bank
    count, channels = x.shape[:2]
    owner = row_slots(slots, rows, count)
    acc = accumulation_dtype(x, y)
    convolution = _CONVOLUTIONS[len(window.kernel)]
    low, high = window.pads[::2], window.pads[1::2]
    padding: Sequence[int] = low
    if low != high:
        sides = [n for pair in reversed([*zip(low, high, strict=True)]) for n in pair]
        x, padding = F.pad(x, sides), [0] * len(low)
    if x.device.type == "cpu" if by_slot is None else by_slot:
        rank_table, scale_table = ranks.tolist(), scales.tolist()
        for slot, index in groups(owner, A.shape[0]):
            r = rank_table[slot][0]
            if r == 0:
                continue
            a = A[slot, :r].to(acc).view(r, channels, *window.kernel)
            v = convolution(x[index].to(acc), a, stride=window.stride, padding=padding)
            v = v.flatten(2) * scale_table[slot][0]
            delta = B[slot, :r].to(acc).T @ v
            y[index] = (y[index].to(acc) + delta.view(len(index), *y.shape[1:])).to(y.dtype)
        return
    row_slot, R = owner.clamp(min=0).long(), B.shape[1]
    live = torch.arange(R, device=x.device) < ranks[row_slot]
    live = (live & (owner >= 0).unsqueeze(-1)).unsqueeze(-1)
    a = torch.where(live, A[row_slot], 0).to(acc).view(count * R, channels, *window.kernel)
    b = torch.where(live, B[row_slot], 0).to(acc) * scales[row_slot].to(acc).unsqueeze(-1)
    grouped_x = x.to(acc).reshape(1, count * channels, *x.shape[2:])
    v = convolution(grouped_x, a, stride=window.stride, padding=padding, groups=count)
    delta = b.mT @ v.view(count, R, -1)
    y.copy_(torch.where((owner >= 0).view(-1, *[1] * (y.dim() - 1)), y + delta.view_as(y), y))


define(
    f"conv_site(Tensor x, Tensor y, {BANK}, SymInt rows, int[] kernel, int[] stride, int[] pads,"
    " Tensor? gains, Tensor? addend, Tensor? shifts) -> Tensor",
    conv_site,
    conv_site_fake,
)
