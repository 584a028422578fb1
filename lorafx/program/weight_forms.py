"""Weights seen through views: the entry of W behind each entry of a tensor.

    t[k_0, ..., k_d] = W[o₀ + Σ k_d · out_d,  i₀ + Σ k_d · into_d]

An *axis* is a dimension's (out_d, into_d), one of them zero, or both (size one, broadcast); a
*form* is all axes and (o₀, i₀). `W.view(H, n + v, K).split([n, v], 1)` gives W_UK (n + v, 0), (1,
0), (0, 1) at (0, 0), and W_UV the same at (n, 0). A *period* p says that index k stands for k mod
p, as for a broadcast batch dimension and a group dimension viewed as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

AnySize = Any  # int or SymInt


class Axis(NamedTuple):
    """Steps along W's out and in dimensions for a step along a dimension; period or 0."""

    out: int = 0
    into: int = 0
    period: int = 0

    @property
    def fixed(self) -> bool:
        return not self.out and not self.into

    def stretched(self, count: int) -> Axis:
        return Axis(self.out * count, self.into * count)


FIXED = Axis()
OUT, IN = Axis(out=1), Axis(into=1)


class WeightForm(NamedTuple):
    """Axes by dimension, and their start in W (out, in)."""

    axes: tuple[Axis, ...]
    out: int = 0
    into: int = 0

    @classmethod
    def of_weight(cls, *, transposed: bool) -> WeightForm:
        """W itself, (out, in), or (in, out) if stored `transposed`."""
        return cls((IN, OUT) if transposed else (OUT, IN))

    def permuted(self, order: Sequence[int]) -> WeightForm:
        return self._replace(axes=tuple(self.axes[dim] for dim in order))

    def moved(self, axis: Axis, index: int) -> WeightForm:
        """The form that begins `index` steps further along `axis`."""
        return self._replace(out=self.out + index * axis.out, into=self.into + index * axis.into)

    def sliced(self, dim: int, start: int, step: int) -> WeightForm | None:
        """Indices start, start + step, ... of a dimension; None through a period."""
        axis = self.axes[dim]
        if axis.period and (start or step != 1):
            return None
        kept = axis if step == 1 else axis.stretched(step)
        axes = (*self.axes[:dim], kept, *self.axes[dim + 1 :])
        return self._replace(axes=axes).moved(axis, start)

    def selected(self, dim: int, index: int) -> WeightForm | None:
        """An index of a dimension, which is dropped."""
        axis = self.axes[dim]
        index = index % axis.period if axis.period else index
        return self._replace(axes=self.axes[:dim] + self.axes[dim + 1 :]).moved(axis, index)

    def reshaped(self, before: Sequence[AnySize], after: Sequence[AnySize]) -> WeightForm | None:
        """Row-major view from sizes `before` to `after`; None where an index is no step in W."""
        left = [
            (size, axis)
            for size, axis in zip(before, self.axes, strict=True)
            if not same_size(size, 1)
        ]
        axes: list[Axis] = []
        for wanted in reversed(after):
            if same_size(wanted, 1):
                axes.append(FIXED)
                continue
            if not left:
                return None
            size, axis = left.pop()
            while not same_size(size, wanted):
                if _divides(wanted, size):
                    parts = _split(axis, wanted)
                    if parts is None:
                        return None
                    left.append((size // wanted, parts[0]))
                    size, axis = wanted, parts[1]
                else:
                    merged = _merged(*left.pop(), size, axis) if left else None
                    if merged is None:
                        return None
                    size, axis = merged
            axes.append(axis)
        return None if left else self._replace(axes=tuple(reversed(axes)))


def same_size(a: AnySize, b: AnySize) -> bool:
    """Equal as ints or symbols, never by a hint, which would add a guard."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.node.expr == b.node.expr


def _divides(part: AnySize, size: AnySize) -> bool:
    return isinstance(part, int) and isinstance(size, int) and part < size and size % part == 0


def _split(axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    own = axis._replace(period=0)
    if axis.fixed:
        return FIXED, FIXED
    if not axis.period:
        return own.stretched(inner), own
    if axis.period % inner == 0:
        outer = axis.period // inner
        return (FIXED if outer == 1 else own.stretched(inner)._replace(period=outer)), own
    if inner % axis.period == 0:
        return FIXED, own if inner == axis.period else axis
    return None


def _merged(
    left_size: AnySize, left: Axis, size: AnySize, axis: Axis
) -> tuple[AnySize, Axis] | None:
    total = left_size * size
    if left.fixed and axis.fixed:
        return total, FIXED
    if left.fixed and isinstance(size, int):
        return total, axis._replace(period=axis.period or size)
    if axis.fixed or axis.period or not isinstance(size, int):
        return None
    if (left.out, left.into) != (axis.out * size, axis.into * size):
        return None
    return total, axis._replace(period=left.period * size)


def strided_form(
    sizes: Sequence[int],
    strides: Sequence[int],
    offset: int,
    weight: torch.Tensor,
    *,
    transposed: bool,
) -> WeightForm | None:
    """The form of a tensor of these sizes, strides and offset in the storage of the 2-D `weight`.
    None where it is irregular: outside of W, or with a stride along both dimensions."""
    if weight.dim() != 2 or not weight.numel():
        return None
    rows, columns = weight.shape
    row, column = weight.stride()
    swapped = row < column
    if swapped:
        rows, columns, row, column = columns, rows, column, row
    if column <= 0 or (rows > 1 and (columns - 1) * column >= row):
        return None  # entries of W itself overlap

    def place(distance: int) -> tuple[int, int] | None:
        first, rest = divmod(distance, row) if rows > 1 else (0, distance)
        return None if rest % column else (first, rest // column)

    start = place(offset - int(weight.storage_offset()))
    steps = [
        place(stride) if size > 1 else (0, 0) for size, stride in zip(sizes, strides, strict=True)
    ]
    if start is None or min(start) < 0 or any(step is None or all(step) for step in steps):
        return None
    known = [step for step in steps if step is not None]
    for side, limit in ((0, rows), (1, columns)):
        reach = sum((size - 1) * step[side] for size, step in zip(sizes, known, strict=True))
        if start[side] + reach >= limit:
            return None
    # `first` counts along the dimension of the larger stride.
    out_first = swapped == transposed
    axes = tuple(Axis(a, b) if out_first else Axis(b, a) for a, b in known)
    return WeightForm(axes, *(start if out_first else start[::-1]))


def copied_form(tensor: torch.Tensor, weight: torch.Tensor) -> WeightForm | None:
    """The form of a copy: `tensor` holds whole rows W[o] of the (out, in) `weight`, rounded to its
    dtype, at regular distances along its other dimensions; else None."""
    if tensor.numel() > weight.numel():
        return None
    weight, columns = weight.to(tensor.dtype), weight.shape[1]
    for dim in reversed(range(tensor.dim())):
        if tensor.shape[dim] == columns:
            form = _rows_along(tensor.movedim(dim, -1), weight)
            if form is not None:
                *others, into = form.axes
                return form._replace(axes=(*others[:dim], into, *others[dim:]))
    return None


def _rows_along(tensor: torch.Tensor, weight: torch.Tensor) -> WeightForm | None:
    """`copied_form` of a tensor whose last dimension is W's in dimension."""
    leading = tensor.shape[:-1]
    for start in _row_like(tensor[(0,) * len(leading)], weight):
        axes, index = [], torch.tensor(start, device=weight.device)
        for dim, size in enumerate(leading):
            step = 0
            if size > 1:
                at = [0] * len(leading)
                at[dim] = 1
                later = [row for row in _row_like(tensor[tuple(at)], weight) if row > start]
                if not later:
                    break
                step = later[0] - start
            axes.append(Axis(out=step))
            grid = torch.arange(size, device=weight.device) * step
            index = index[..., None] + grid
        inside = len(axes) == len(leading) and int(index.max()) < weight.shape[0]
        if inside and torch.equal(weight[index], tensor):
            return WeightForm((*axes, IN), start, 0)
    return None


def _row_like(row: torch.Tensor, weight: torch.Tensor, limit: int = 4) -> list[int]:
    candidates = (weight[:, 0] == row[0]).nonzero().squeeze(-1)
    same = (weight[candidates] == row).all(1)
    return candidates[same][:limit].tolist()
