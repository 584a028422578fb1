"""Forms: which entries of a weight a tensor holds.

The form of a tensor in a weight says which entry of W each entry of a tensor is:

    t[k_0, ..., k_d] = W[o₀ + Σ k_d · out_d,  i₀ + Σ k_d · into_d]

An *axis* is the (out_d, into_d) of a dimension, one of them zero, or both (size one, broadcast); a
*form* is all axes and (o₀, i₀). `W.view(H, n + v, K).split([n, v], 1)` gives W_UK (n + v, 0), (1,
0), (0, 1) at (0, 0), and W_UV the same at (n, 0). A *period* p says that index k stands for k mod
p, as for a broadcast batch dimension and a group dimension viewed as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorafx.ownership.memory import Geometry

AnySize = Any  # int or SymInt


class Axis(NamedTuple):
    """Steps in W's out and in dimensions for one step along a dimension, and its period or 0."""

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
    """The axis of each dimension, and the place in W (out, in) of the first entry."""

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
        """The form of indices start, start + step, ... of a dimension; None if it has a period."""
        axis = self.axes[dim]
        if axis.period and (start or step != 1):
            return None
        sliced_axis = axis if step == 1 else axis.stretched(step)
        axes = (*self.axes[:dim], sliced_axis, *self.axes[dim + 1 :])
        return self._replace(axes=axes).moved(axis, start)

    def selected(self, dim: int, index: int) -> WeightForm | None:
        """The form at an index of a dimension, which is dropped."""
        axis = self.axes[dim]
        index = index % axis.period if axis.period else index
        return self._replace(axes=self.axes[:dim] + self.axes[dim + 1 :]).moved(axis, index)

    def reshaped(self, before: Sequence[AnySize], after: Sequence[AnySize]) -> WeightForm | None:
        """The form of a row-major view from sizes `before` to `after`; None if irregular."""
        remaining = [
            (size, axis)
            for size, axis in zip(before, self.axes, strict=True)
            if not same_size(size, 1)
        ]
        axes: list[Axis] = []
        for new_size in reversed(after):
            if same_size(new_size, 1):
                axes.append(FIXED)
                continue
            if not remaining:
                return None
            size, axis = remaining.pop()
            while not same_size(size, new_size):
                if _divides(new_size, size):
                    parts = _split(axis, new_size)
                    if parts is None:
                        return None
                    remaining.append((size // new_size, parts[0]))
                    size, axis = new_size, parts[1]
                else:
                    merged = _merged(*remaining.pop(), size, axis) if remaining else None
                    if merged is None:
                        return None
                    size, axis = merged
            axes.append(axis)
        return None if remaining else self._replace(axes=tuple(reversed(axes)))


def same_size(a: AnySize, b: AnySize) -> bool:
    """Whether two sizes are equal as ints or symbols; hints, which add guards, are not read."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.node.expr == b.node.expr


def _divides(part: AnySize, size: AnySize) -> bool:
    return isinstance(part, int) and isinstance(size, int) and part < size and size % part == 0


def _split(axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    unbounded = axis._replace(period=0)
    if axis.fixed:
        return FIXED, FIXED
    if not axis.period:
        return unbounded.stretched(inner), unbounded
    if axis.period % inner == 0:
        outer = axis.period // inner
        first = FIXED if outer == 1 else unbounded.stretched(inner)._replace(period=outer)
        return first, unbounded
    if inner % axis.period == 0:
        return FIXED, unbounded if inner == axis.period else axis
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


def strided_form(part: Geometry, weight: Geometry, *, transposed: bool) -> WeightForm | None:
    """The form of a tensor in the storage of the 2-D `weight`, by both geometries. None if it is
    irregular: partly outside of W, or with a stride along both dimensions."""
    (sizes, strides, offset), (shape, weight_strides, start_of_weight) = part, weight
    if len(shape) != 2 or not math.prod(shape):
        return None
    (rows, columns), (row, column) = shape, weight_strides
    swapped = row < column
    if swapped:
        rows, columns, row, column = columns, rows, column, row
    if column <= 0 or (rows > 1 and (columns - 1) * column >= row):
        return None  # entries of W itself overlap

    def place(distance: int) -> tuple[int, int] | None:
        first, remainder = divmod(distance, row) if rows > 1 else (0, distance)
        return None if remainder % column else (first, remainder // column)

    start = place(offset - start_of_weight)
    steps = [
        place(stride) if size > 1 else (0, 0) for size, stride in zip(sizes, strides, strict=True)
    ]
    if start is None or min(start) < 0 or any(step is None or all(step) for step in steps):
        return None
    known = [step for step in steps if step is not None]
    for side, limit in ((0, rows), (1, columns)):
        extent = sum((size - 1) * step[side] for size, step in zip(sizes, known, strict=True))
        if start[side] + extent >= limit:
            return None
    # `first` counts along the dimension of the larger stride.
    out_first = swapped == transposed
    axes = tuple(Axis(a, b) if out_first else Axis(b, a) for a, b in known)
    return WeightForm(axes, *(start if out_first else start[::-1]))


def copied_form(tensor: torch.Tensor, weight: torch.Tensor) -> WeightForm | None:
    """The form of a copy: `tensor` is whole rows W[o] of the (out, in) `weight`, rounded to its
    dtype, at regular distances along its other dimensions. None if it is no copy."""
    columns = weight.shape[1]
    for dim in reversed(range(tensor.dim())):
        if tensor.shape[dim] == columns:
            form = _rows_along(tensor.movedim(dim, -1), weight)
            if form is not None:
                *leading, into = form.axes
                return form._replace(axes=(*leading[:dim], into, *leading[dim:]))
    return None


def _rows_along(tensor: torch.Tensor, weight: torch.Tensor) -> WeightForm | None:
    """`copied_form` of a tensor whose last dimension is the in dimension of W."""
    leading = tensor.shape[:-1]
    for start in _rows_equal_to(tensor[(0,) * len(leading)], weight):
        axes, index = [], torch.tensor(start, device=weight.device)
        for dim, size in enumerate(leading):
            step = 0
            if size > 1:
                position = [0] * len(leading)
                position[dim] = 1
                equal_rows = _rows_equal_to(tensor[tuple(position)], weight)
                next_rows = [row for row in equal_rows if row > start]
                if not next_rows:
                    break
                step = next_rows[0] - start
            axes.append(Axis(out=step))
            grid = torch.arange(size, device=weight.device) * step
            index = index[..., None] + grid
        inside = len(axes) == len(leading) and int(index.max()) < weight.shape[0]
        if inside and torch.equal(weight[index].to(tensor.dtype), tensor):
            return WeightForm((*axes, IN), start, 0)
    return None


def _rows_equal_to(row: torch.Tensor, weight: torch.Tensor, limit: int = 4) -> list[int]:
    candidates = (weight[:, 0].to(row.dtype) == row[0]).nonzero().squeeze(-1)
    same = (weight[candidates].to(row.dtype) == row).all(1)
    return candidates[same][:limit].tolist()
