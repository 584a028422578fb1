"""Finds tensors that would keep old numbers of a weight when the weight is written.

    t[k_0, …] = W[o₀ + Σ k_d · out_d, …]          an exact copy of rows
    another matrix near a weight                  may be made from it, unless graphs use W itself

Views of a weight change with it. W is (N, K) of a linear, (V, D) of an embedding, (E · A, B) of
routed experts stored as (E, A, B).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafx.model.experts import expert_weights
from lorafx.model.module_graph import ByStorage, Holder, storage_key
from lorafx.program.derived import is_near, is_numbers, is_varied, named_tensors, numbers_of
from lorafx.program.weight_forms import copied_form
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.program.program import Program


def _dense(weight: Holder) -> Tensor | None:
    """W (rows, columns), dequantised if it is quantised; None if it cannot be read."""
    name = None if weight.is_own_weight else weight.attribute
    dense = numbers_of(weight.module, name)
    if dense is None or not dense.numel() or dense.dim() < 2:
        return None
    return dense.flatten(0, -2)


@torch.no_grad()
def outdated_copies(
    program: Program, changed: Sequence[Holder], renewed: Collection[nn.Module] = ()
) -> list[str]:
    """Why the tensors `changed` cannot be written: a message for each other tensor that has, or may
    have, copies of their numbers, except in the modules `renewed`, which compute theirs again."""
    modules = {id(holder.module) for holder in changed}
    tensors = [holder.tensor for holder in changed if isinstance(holder.tensor, Tensor)]
    written, in_place = {id(t) for t in tensors}, ByStorage((t, t) for t in tensors)

    def is_changed(weight: Holder) -> bool:
        return id(weight.module) in modules or id(weight.tensor) in written

    weights = list(_weights(program.model))
    problems = []
    for copy, tensor in _tensors(program.model):
        parent = copy.path.rpartition(".")[0]
        near = [weight for weight in weights if is_near(weight.path, parent)]
        if not any(map(is_changed, near)) or in_place.overlapping(tensor):
            continue
        if copy.module in renewed:
            continue
        sources = [weight for weight in _sources(program, copy, tensor, near) if is_changed(weight)]
        if sources:
            names = ", ".join(map(str, sources))
            problems.append(
                f"{names}: {copy} repeats its numbers or may have been made from it, and would "
                "keep the old ones, since only views of a weight change with it"
            )
    return problems


def _sources(
    program: Program, copy: Holder, tensor: Tensor, near: Sequence[Holder]
) -> list[Holder]:
    """The weight of which `tensor` is a copy, or all from which it may have been made."""
    parameter = isinstance(tensor, nn.Parameter)
    if not is_varied(tensor):
        return []
    candidates = []
    for weight in near:
        entry = lookup(weight.module)
        if parameter and (entry is None or entry.kind != "linear"):
            continue
        dense = _dense(weight)
        if dense is None or dense.device != tensor.device:
            continue
        if copied_form(tensor, dense) is not None:
            return [weight]
        if dense.shape[1] in tensor.shape:
            candidates.append(weight)
    # Tensors that checkpoints hold get their numbers from there.
    if parameter or _is_saved(copy):
        return []
    return [weight for weight in candidates if _is_bypassed(program, weight)]


def _is_bypassed(program: Program, weight: Holder) -> bool:
    """Whether no graph has been seen to use this weight at a site that has it, maybe tied."""
    for site in program.sites:
        used = site.path in program.reached and site.path not in program.replaced
        name = site.eligible.weight
        is_own = site.module is weight.module and name == weight.attribute
        is_tied = weight.tensor is not None and getattr(site.module, name, None) is weight.tensor
        if not used and (is_own or is_tied):
            return True
    return False


def _tensors(model: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    """Tensors of two or more dimensions that may hold copies: no weights, nor views of them."""
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
            # Linears and experts hold weights and scales, which are no copies.
            if computes and (
                parameter or name in weights or holder.is_own_weight or _is_saved(holder)
            ):
                continue
            if parameter or storage_key(value) not in storages:
                yield holder, value


def _is_saved(holder: Holder) -> bool:
    module, name = holder.module, holder.attribute
    return name in module._buffers and name not in module._non_persistent_buffers_set


def _weights(model: nn.Module) -> Iterator[Holder]:
    for path, module in model.named_modules():
        entry = lookup(module)
        if entry is not None and entry.kind in ("linear", "embedding"):
            yield Holder(path, module, entry.weight)
        for weight in expert_weights(module) or ():
            yield Holder(path, module, weight.name)
