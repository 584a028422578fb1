"""Tensors that contain a site's weight, or a part of it, under another name.

Serving code cuts `kv_b_proj.weight` into W_UK and W_UV after loading, as views or, after
dequantisation or `contiguous`, as copies. Graphs that multiply by them bypass the weight's module.

    views     are found by storage: sizes, strides and offset in the weight's storage
    copies    are found by value: all rows of the tensor are rows of W at regular distances, or all
              values are those of an embedding's or a convolution's weight

`match` refuses the site of a view without a regular form. Other copies (scaled, rounded, reordered)
are not recognised; `match` refuses an unused site if such a tensor may replace its weight. Eager
mode looks for the same tensors. The form says which entry of W each entry of a tensor is:

    t[k_0, ..., k_d] = W[o₀ + Σ k_d · out_d,  i₀ + Σ k_d · into_d]

An *axis* is the (out_d, into_d) of a dimension, one of them zero, or both (size one, broadcast); a
*form* is all axes and (o₀, i₀). `W.view(H, n + v, K).split([n, v], 1)` gives W_UK (n + v, 0), (1,
0), (0, 1) at (0, 0), and W_UV the same at (n, 0). A *period* p says that index k stands for k mod
p, as for a broadcast batch dimension and a group dimension viewed as one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lorafx.errors import ConfigError
from lorafx.model.module_graph import ByStorage
from lorafx.model.quantized import dequantize, readable
from lorafx.model.sites import Site
from lorafx.model.weight_formats import is_dense
from lorafx.placements import local
from lorafx.registry import lookup
from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass, unset_fake_temporarily

if TYPE_CHECKING:
    from lorafx.program.frame import FrameInput
    from lorafx.program.program import Program

AnySize = Any  # int or SymInt
#: How many distinct values a tensor needs to be compared with weights.
DISTINCT = 16


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


def strided_form(
    sizes: Sequence[int],
    strides: Sequence[int],
    offset: int,
    weight: torch.Tensor,
    *,
    transposed: bool,
) -> WeightForm | None:
    """The form of a tensor of these sizes, strides and offset in the storage of the 2-D `weight`.
    None if it is irregular: partly outside of W, or with a stride along both dimensions."""
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
        first, remainder = divmod(distance, row) if rows > 1 else (0, distance)
        return None if remainder % column else (first, remainder // column)

    start = place(offset - int(weight.storage_offset()))
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


@dataclass(frozen=True)
class Derived:
    """The weight (N, K) of tied `sites` in a tensor; its form if regular; `copied` if no view."""

    sites: tuple[Site, ...]
    form: WeightForm | None
    shape: tuple[int, int]
    copied: bool


@dataclass(frozen=True)
class Holder:
    """An attribute of a module that holds a tensor."""

    path: str
    module: nn.Module
    attribute: str

    def __str__(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def tensor(self) -> Any:
        """What it holds now; None if the attribute is gone."""
        return getattr(self.module, self.attribute, None)

    @property
    def local(self) -> Tensor:
        """The tensor, or this rank's part of a DTensor."""
        return local(self.tensor)

    @property
    def is_own_weight(self) -> bool:
        """Whether it is the weight or bias of a module that may be a site, such as a tied head."""
        entry = lookup(self.module)
        return entry is not None and self.attribute in (entry.weight, "bias")


class DerivedTensors:
    """Finds the weights of sites in other tensors of a program."""

    def __init__(self, program: Program) -> None:
        self._owner = weakref.ref(program)  # no cycle: models are freed with their last reference
        self._compared = WeakTensorKeyDictionary()
        self._views = WeakTensorKeyDictionary()
        self._parts = WeakTensorKeyDictionary()
        self._held: dict[int, Holder] = {}

    @property
    def _program(self) -> Program:
        program = self._owner()
        assert program is not None
        return program

    def of(self, tensor: Tensor) -> Derived | None:
        """The weight in `tensor`, if it is a view or has been compared before."""
        if tensor in self._compared:
            return self._compared[tensor]
        if isinstance(tensor, nn.Parameter):
            return None
        if tensor not in self._views:
            self._views[tensor] = self._by_storage(tensor, self._sites_by_storage())
        return self._views[tensor]

    def look(self, tensor: Tensor) -> Derived | None:
        """The weight in `tensor`, copies included. Each tensor is compared once, and so is each
        view of one: a forward makes new views in every call. A view of a copy counts as one: eager
        mode sees no attribute, only what is made of it, such as its broadcast by `matmul`."""
        whole = tensor._base
        if whole is None:
            return self._look(tensor)
        if isinstance(whole, nn.Parameter):
            holder = self._holder(whole)
            if holder is not None and holder.is_own_weight:
                return self._look(whole)
        parts = self._parts.setdefault(whole, {})
        key = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        if key not in parts:
            once = [slice(1) if not stride else slice(None) for stride in tensor.stride()]
            parts[key] = self._look(tensor[tuple(once)].squeeze()) or self._look(whole)
        return parts[key]

    def _look(self, tensor: Tensor) -> Derived | None:
        if tensor not in self._compared:
            self._compare([tensor])
        return self._compared[tensor]

    def of_attribute(self, tensor: Tensor) -> Derived | None:
        """`look`, if a module of the model holds `tensor`."""
        if tensor not in self._compared and self._holder(tensor) is None:
            self._compared[tensor] = None
        return self._look(tensor)

    def inputs(
        self, examples: Sequence[Any], known: Mapping[int, FrameInput], data: Mapping[int, Any]
    ) -> dict[int, Derived]:
        """A graph's inputs that contain weights of sites, by identity. Earlier graphs' results
        count as `data` of the call: other uses of a weight there would have been refused."""
        candidates = [
            example
            for example in examples
            if isinstance(example, Tensor)
            and example.numel() > 1
            and id(example) not in data
            and not self._program.is_result(example)
            and (id(example) not in known or known[id(example)].kind == "state")
        ]
        return self._compare(candidates)

    def _compare(self, tensors: Sequence[Tensor]) -> dict[int, Derived]:
        """The weights in these tensors, by identity."""
        weights: dict[int, Derived] = {}
        if not tensors:
            return weights
        with unset_fake_temporarily(), torch.no_grad():
            storages = self._sites_by_storage()
            for tensor in tensors:
                holder, derived = self._holder(tensor), None
                if holder is None or not holder.is_own_weight:
                    derived = self._by_storage(tensor, storages)
                    if derived is None and is_numbers(tensor):
                        derived = self._by_value(tensor, holder)
                self._compared[tensor] = derived
                if derived is not None:
                    weights[id(tensor)] = derived
        return weights

    def _holder(self, tensor: Tensor) -> Holder | None:
        """The first attribute of a module that holds the tensor."""
        for _ in range(2):  # as it was, and looked at anew
            holder = self._held.get(id(tensor))
            if holder is not None and getattr(holder.module, holder.attribute, None) is tensor:
                return holder
            self._held = {}
            for path, module in self._program.model.named_modules():
                for name, value in named_tensors(module):
                    self._held.setdefault(id(value), Holder(path, module, name))
        return None

    def _likely_sites(self, holder: Holder | None) -> Iterator[Site]:
        """Sites of which a tensor is a copy rather than of others with the same values: its
        holder's, or a child, a sibling, or a sibling of the parent of the holder."""
        if holder is None:
            return
        own, near = lookup(holder.module) is not None, holder.path.rpartition(".")[0]
        for site in self._program.sites:
            if site.module is holder.module or (
                not own and any(is_near(path, near) for path in site.paths)
            ):
                yield site

    def _sites_by_storage(self) -> ByStorage[Site]:
        weights = ((site, self._program.weight_of(site)) for site in self._program.sites)
        return ByStorage(
            (site, weight)
            for site, weight in weights
            if weight is not None and (weight.dim() == 2 or site.eligible.kind == "conv")
        )

    def _by_storage(self, tensor: Tensor, sites: ByStorage[Site]) -> Derived | None:
        for site, weight in sites.overlapping(tensor):
            transposed = site.eligible.transposed
            form = None
            if tensor.dtype == weight.dtype and weight.dim() == 2:
                place = tensor.shape, tensor.stride(), int(tensor.storage_offset())
                form = strided_form(*place, weight, transposed=transposed)
            first, second = len(weight), weight.numel() // len(weight)
            shape = (second, first) if transposed else (first, second)
            return Derived(self._tied(site), form, shape, copied=False)
        return None

    def _by_value(self, tensor: Tensor, holder: Holder | None) -> Derived | None:
        if not is_varied(tensor):
            return None
        found = next(self._copies(tensor, self._likely_sites(holder)), None)
        if found is None:
            copies = list(self._copies(tensor, self._program.sites))
            weights = {id(self._program.weight_of(copy.sites[0])) for copy in copies}
            if len(weights) > 1:  # it may be a copy of either
                sites = tuple(dict.fromkeys(site for copy in copies for site in copy.sites))
                return replace(copies[0], sites=sites, form=None)
            found = copies[0] if copies else None
        return found

    def _copies(self, tensor: Tensor, sites: Iterable[Site]) -> Iterator[Derived]:
        for site in sites:
            size, form = site.in_features * site.out_features, None
            rows = site.eligible.kind == "linear" and tensor.dim() > 1
            weight = self._program.weight_of(site)
            if rows and site.in_features in tensor.shape and tensor.numel() <= size:
                weight = dense_weight(site)
                if weight is not None and weight.device == tensor.device:
                    form = copied_form(tensor, weight)
            if weight is None or (form is None and not _same_values(tensor, weight)):
                continue
            shape = (weight.shape[0], weight.numel() // weight.shape[0])
            yield Derived(self._tied(site), form, shape, copied=True)

    def _tied(self, site: Site) -> tuple[Site, ...]:
        weight = self._program.weight_of(site)
        return tuple(
            other
            for other in self._program.sites
            if other is site or (weight is not None and self._program.weight_of(other) is weight)
        )


def _same_values(tensor: Tensor, weight: Tensor) -> bool:
    """Whether all values of a weight of any sizes are those of the tensor, in order."""
    same = tensor.numel() == weight.numel() and tensor.device == weight.device
    if not same or not is_numbers(weight):
        return False
    return torch.equal(weight.reshape(-1).to(tensor.dtype), tensor.reshape(-1))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters, buffers and tensor attributes by name."""
    for place in (module._parameters, module._buffers, vars(module)):
        for name, value in place.items():
            if isinstance(value, Tensor):
                yield name, value


def is_near(path: str, module: str) -> bool:
    """Whether `path` is a child or a grandchild of `module`."""
    inside = not module or path.startswith(f"{module}.")
    return inside and path[len(module) + bool(module) :].count(".") <= 1


def is_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds plain, dense floating-point numbers."""
    return is_dense(tensor) and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)


def has_numbers(site: Site) -> bool:
    """Whether `dense_weight` can read the weight, without reading it."""
    return readable(site.module, site.eligible)


def dense_weight(site: Site) -> Tensor | None:
    """W (N, K) as dense numbers, from any readable format; else None."""
    dense = numbers_of(site.module)
    sizes = (site.out_features, site.in_features)
    return dense if dense is not None and tuple(dense.shape) == sizes else None


def numbers_of(module: nn.Module, attribute: str | None = None) -> Tensor | None:
    """The module's weight, or another parameter, as dense numbers; None if it is not readable."""
    try:
        dense = dequantize(module, attribute)
    except ConfigError:
        return None
    return dense if is_numbers(dense) else None


def is_varied(tensor: Tensor) -> bool:
    """Whether there are at least `DISTINCT` values among some of the tensor's entries."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // (8 * DISTINCT))
    return len(flat[::step].unique()) >= DISTINCT
