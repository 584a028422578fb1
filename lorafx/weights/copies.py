"""Tensors that repeat numbers of weights and have to follow them.

    t[k_0, …] = W[o₀ + Σ k_d · out_d, i₀ + Σ k_d · into_d]    an exact copy of rows: computed anew,
                                                              into the same memory
    a matrix of another make, held beside a weight            may be made from it: refused, unless
                                                              graphs use the weight itself

Views of a weight see new numbers by themselves. W is (N, K) of a linear, (V, D) of an embedding,
(E · A, B) of routed experts stored (E, A, B).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafx.model.experts import expert_weights
from lorafx.model.module_graph import storage_key
from lorafx.model.sites import Site
from lorafx.program.derived import (
    Axis,
    Holder,
    WeightForm,
    copied_form,
    is_near,
    is_numbers,
    is_varied,
    named_tensors,
    numbers_of,
)
from lorafx.registry import lookup
from lorafx.weights.deltas import write
from lorafx.weights.weight_places import Target

if TYPE_CHECKING:
    from lorafx.program.program import Program


@dataclass(frozen=True)
class Weight:
    """A weight of a linear, an embedding or routed experts, by where it is held."""

    holder: Holder
    kind: str

    def dense(self) -> Tensor | None:
        """W (rows, columns), dequantised where it is quantised; None where it cannot be read."""
        name = self.holder.attribute if self.kind == "experts" else None
        dense = numbers_of(self.holder.module, name)
        if dense is None or not dense.numel() or dense.dim() < 2:
            return None
        return dense.flatten(0, -2)


@dataclass(frozen=True, eq=False)
class Copy:
    """An exact copy of rows of a weight, or with `form` None a tensor maybe made from it."""

    holder: Holder
    tensor: Tensor
    weights: tuple[Weight, ...]
    form: WeightForm | None

    def touched(self, sites: Sequence[Site]) -> list[Site]:
        """The sites whose weights, tied ones too, these are."""
        held = [(weight.holder.module, weight.holder.attribute) for weight in self.weights]
        tensors = [getattr(module, name, None) for module, name in held]
        found = {}
        for site in reversed(sites):
            name = site.eligible.weight
            value = getattr(site.module, name, None)
            is_tied = isinstance(value, Tensor) and any(value is tensor for tensor in tensors)
            if is_tied or any(site.module is module and name == other for module, other in held):
                found[id(site.module), name] = site
        return list(reversed(found.values()))

    def follow(self, dense: Tensor) -> None:
        assert self.form is not None
        rows = _indices(self.tensor, self.form, self.form.out, lambda axis: axis.out)
        columns = _indices(self.tensor, self.form, self.form.into, lambda axis: axis.into)
        value = dense[rows.to(dense.device), columns.to(dense.device)]
        write(self.tensor, value.to(self.tensor.dtype))

    def unexplained(self, program: Program) -> list[Site]:
        """Sites whose weights it may have been made from, unless graphs use the weights."""
        if self.form is not None or not is_varied(self.tensor):
            return []
        return [
            site
            for site in self.touched(program.sites)
            if site.path not in program.reached or site.path in program.replaced
        ]


def copies_of(program: Program) -> list[Copy]:
    """Tensors of a program's model that repeat, or may repeat, numbers of its weights."""
    model = program.model
    weights = list(_weights(model))
    found = []
    for holder, tensor in _tensors(model):
        parent = holder.path.rpartition(".")[0]
        near = [weight for weight in weights if is_near(weight.holder.path, parent)]
        copy = _copy(holder, tensor, near)
        if copy is not None:
            found.append(copy)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    """Tensors of two and more dimensions in modules that are not in the memory of weights."""
    storages = {storage_key(parameter) for parameter in model.parameters()}
    for path, module in model.named_modules():
        experts = expert_weights(module)
        weights = {weight.name for weight in experts or ()}
        computes = experts is not None or lookup(module) is not None
        for name, value in named_tensors(module):
            if value.dim() < 2 or not is_numbers(value):
                continue
            holder = Holder(path, module, name)
            parameter = isinstance(value, nn.Parameter)
            # Linears and the like have parameters and scales of their own.
            if computes and (
                parameter or name in weights or holder.is_own_weight or _is_saved(holder)
            ):
                continue
            if parameter or storage_key(value) not in storages:
                yield holder, value


def _is_saved(holder: Holder) -> bool:
    module, name = holder.module, holder.attribute
    return name in module._buffers and name not in module._non_persistent_buffers_set


def _weights(model: nn.Module) -> Iterator[Weight]:
    for path, module in model.named_modules():
        entry = lookup(module)
        if entry is not None and entry.kind in ("linear", "embedding"):
            yield Weight(Holder(path, module, entry.weight), entry.kind)
        for weight in expert_weights(module) or ():
            yield Weight(Holder(path, module, weight.name), "experts")


def _copy(holder: Holder, tensor: Tensor, near: Sequence[Weight]) -> Copy | None:
    parameter, varied = isinstance(tensor, nn.Parameter), is_varied(tensor)
    beside = []
    for weight in near:
        if parameter and (weight.kind != "linear" or not varied):
            continue
        dense = weight.dense()
        if dense is None or dense.device != tensor.device:
            continue
        form = copied_form(tensor, dense) if varied else None
        if form is not None:
            return Copy(holder, tensor, (weight,), form)
        if dense.shape[1] in tensor.shape:
            beside.append(weight)
    # A tensor of checkpoints gets its numbers from there.
    if parameter or not beside or _is_saved(holder):
        return None
    return Copy(holder, tensor, tuple(beside), None)


def _indices(
    tensor: Tensor, form: WeightForm, start: int, step_of: Callable[[Axis], int]
) -> Tensor:
    dims = tensor.dim()
    indices = torch.full((1,) * dims, start)
    for dim, (size, axis) in enumerate(zip(tensor.shape, form.axes, strict=True)):
        index = torch.arange(size)
        if axis.period:
            index = index % axis.period
        shape = [1] * dims
        shape[dim] = size
        indices = indices + (index * step_of(axis)).view(shape)
    return indices


class Copies:
    """The copies that a model holds before an update."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._copies = copies_of(program)

    def holds(self, target: Target) -> bool:
        """Whether a target is computed from another."""
        return any(copy.tensor is target.tensor for copy in self._copies)

    def refusals(self, filled: Iterable[Target]) -> list[str]:
        """Why tensors computed from the weights that get new numbers cannot follow them."""
        filled = list(filled)
        modules = {id(target.module) for target in filled}
        found = []
        for copy in self._of(filled):
            sites = [s for s in copy.unexplained(self._program) if id(s.module) in modules]
            if sites:
                names = ", ".join(f"{site.path}.{site.eligible.weight}" for site in sites)
                found.append(
                    f"{names}: {copy.holder} may have been computed from it, and cannot be updated "
                    "with it. Views and exact copies of its rows are; for anything else, load the "
                    "weights before lorafx.compile"
                )
        return found

    def refresh(self, filled: Iterable[Target]) -> None:
        """Compute what follows these weights."""
        for copy in self._of(filled):
            if copy.form is not None:
                dense = copy.weights[0].dense()
                assert dense is not None
                copy.follow(dense)

    def _of(self, filled: Iterable[Target]) -> list[Copy]:
        modules, tensors = set(), set()
        for target in filled:
            modules.add(id(target.module))
            tensors.add(id(target.tensor))
        return [
            copy
            for copy in self._copies
            if any(id(weight.holder.module) in modules for weight in copy.weights)
            if id(copy.tensor) not in tensors
        ]
