"""Which tensors of a model repeat numbers of its weights.

    rows of one weight at regular distances    W.view(H, n + v, L)[:, :n]: a `WeightForm`
    rows, or columns, of one weight or more    cat([W_q, W_k]) and its transpose, scales, roundings
    neighbours of one weight                   another order
    one number, beside a weight that holds one made before there were weights: nothing tells of what

A weight is a matrix (rows, columns): (N, K) of linears, (V, D) of embeddings, (E · A, B) of routed
experts stored (E, A, B). A tensor is compared with the weights beside and below the module that
holds it. Parameters are compared with linears alone, and by default in the first way: others have
numbers of their own, whatever they were initialised with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lorafx.model.experts import expert_weights
from lorafx.model.module_graph import storage_key
from lorafx.program.derived import Holder, held_by, is_near, is_numbers, is_varied, numbers_of
from lorafx.program.weight_forms import ALIKE, WeightForm, copied_form, in_runs, repeats_numbers
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.program.program import Program

#: Rows of a tensor that are looked for in weights; the shortest ones that say anything where any of
#: several weights may have them; and how many have to be found.
_ROWS, _SHORTEST, _FEWEST = 64, 8, 3
#: Rows of a weight that are looked at together.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Weight:
    """A weight of a linear, an embedding or routed experts, by where it is held."""

    holder: Holder
    kind: str

    def dense(self) -> Tensor | None:
        """(rows, columns) as numbers, dequantised where they are quantised; None where they cannot
        be had."""
        module, experts = self.holder.module, self.kind == "experts"
        dense = numbers_of(module, self.holder.attribute if experts else None)
        if dense is None or not dense.numel() or dense.dim() < 2:
            return None
        return dense.flatten(0, -2)


@dataclass(frozen=True)
class Repeat:
    """A tensor that repeats numbers of weights.

    Attributes:
        holder, tensor: who holds it, and it.
        weights: whose numbers; with a form just one.
        form: where they are in that, None where they are in no such form.
        certain: whether its values show that; otherwise it may hold such numbers.
    """

    holder: Holder
    tensor: Tensor
    weights: tuple[Weight, ...]
    form: WeightForm | None = None
    certain: bool = True


def repeats(program: Program, *, parameters: bool = False) -> list[Repeat]:
    """The tensors that the program's model holds and that repeat numbers of its weights.

    Args:
        parameters: also those whose numbers lie in no form, by the numbers of linears. For new
            weights such a parameter is one of its own: where a checkpoint lacks it, it is missing.
    """
    model = program.model
    tensors = list(_tensors(model))
    if not tensors:
        return []
    weights = list(_weights(model))
    found = []
    for holder, tensor in tensors:
        parent = holder.path.rpartition(".")[0]
        near = [weight for weight in weights if is_near(weight.holder.path, parent)]
        repeat = _repeat(holder, tensor, near, parameters=parameters) or _in_place_of_sites(
            program, holder, tensor
        )
        if repeat is not None:
            found.append(repeat)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    """Matrices and more that modules hold and that are no weights' own memory."""
    own = {storage_key(parameter) for parameter in model.parameters()}
    for path, module in model.named_modules():
        experts = expert_weights(module)
        weights = {weight.name for weight in experts or ()}
        computes = experts is not None or lookup(module) is not None
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        for name, value in held_by(module):
            if value.dim() < 2 or not is_numbers(value):
                continue
            holder = Holder(path, module, name)
            parameter = isinstance(value, nn.Parameter)
            # Linears and the like have parameters and scales of their own.
            if computes and (parameter or name in kept or name in weights or holder.is_own_weight):
                continue
            if parameter or storage_key(value) not in own:
                yield holder, value


def _weights(model: nn.Module) -> Iterator[Weight]:
    for path, module in model.named_modules():
        entry = lookup(module)
        if entry is not None and entry.kind in ("linear", "embedding"):
            yield Weight(Holder(path, module, entry.weight), entry.kind)
        for weight in expert_weights(module) or ():
            yield Weight(Holder(path, module, weight.name), "experts")


def _repeat(
    holder: Holder, tensor: Tensor, near: Sequence[Weight], *, parameters: bool
) -> Repeat | None:
    parameter, varied = isinstance(tensor, nn.Parameter), is_varied(tensor)
    if parameter:
        near = [weight for weight in near if weight.kind == "linear"]
    if not near or not (varied or (not parameter and _is_constant(tensor))):
        return None
    known = [
        (weight, dense)
        for weight in near
        if (dense := weight.dense()) is not None and dense.device == tensor.device
    ]
    if not varied:
        maybe = tuple(weight for weight, dense in known if _maybe_made_of(tensor, dense))
        return Repeat(holder, tensor, maybe, certain=False) if maybe else None
    for weight, dense in known:
        form = copied_form(tensor, dense)
        if form is not None:
            return Repeat(holder, tensor, (weight,), form)
    if parameter and not parameters:
        return None
    sources = None if parameter else _sources_of_rows(tensor, known)
    if sources:
        return Repeat(holder, tensor, sources)
    for weight, dense in known:
        if weight.kind == "linear":
            same = repeats_numbers(tensor, dense)
        else:  # large: another order of all of it
            same = tensor.numel() == dense.numel() and in_runs(tensor, dense.to(tensor.dtype))
        if same:
            return Repeat(holder, tensor, (weight,))
    return None


def _sources_of_rows(
    tensor: Tensor, known: Sequence[tuple[Weight, Tensor]]
) -> tuple[Weight, ...] | None:
    """The weights whose rows or columns the rows of `tensor` along some dimension point along,
    rows of zeros excepted; None where some row is of no weight."""
    for dim, size in enumerate(tensor.shape):
        if size < _SHORTEST:
            continue
        lines = tensor.detach().movedim(dim, -1).flatten(0, -2)
        picked = normalize(lines[:: -(-len(lines) // _ROWS)].float(), dim=1)
        empty = ~picked.any(1)
        matched = torch.zeros_like(empty)
        sources = []
        for weight, dense in known:
            here = torch.zeros_like(empty)
            for side in (dense, dense.mT):
                if side.shape[1] == size:
                    here |= _points_along(picked, side)
            if bool(here.any()):
                sources.append(weight)
                matched |= here
        if int(matched.sum()) >= _FEWEST and bool((matched | empty).all()):
            return tuple(sources)
    return None


def _points_along(picked: Tensor, side: Tensor) -> Tensor:
    """Which of the unit rows `picked` point where some row of `side` does."""
    found = torch.zeros(len(picked), dtype=torch.bool, device=picked.device)
    for block in side.split(_BLOCK):
        cosines = picked @ normalize(block.float(), dim=1).T
        found |= cosines.abs().amax(1) > ALIKE
    return found


def _maybe_made_of(tensor: Tensor, dense: Tensor) -> bool:
    """Whether a matrix of a single number may have been made of a weight of a single number."""
    sizes = [size for size in tensor.shape if size > 1]
    return len(sizes) > 1 and bool(set(sizes) & set(dense.shape)) and _is_constant(dense)


def _is_constant(tensor: Tensor) -> bool:
    """Whether all numbers are the same."""
    if not tensor.numel():
        return False
    first = tensor.detach()[(0,) * tensor.dim()]
    return all(bool((part == first).all()) for part in (tensor.detach()[0], tensor.detach()))


def _in_place_of_sites(program: Program, holder: Holder, tensor: Tensor) -> Repeat | None:
    """What a graph seemed to multiply by in place of a site's weight
    (lorafx.passes.match.match)."""
    if isinstance(tensor, nn.Parameter) or not program.replaced:
        return None
    weights = tuple(
        Weight(Holder(site.path, site.module, site.eligible.weight), site.eligible.kind)
        for site in program.sites
        if site.path in program.replaced
        if is_near(str(holder), site.path.rpartition(".")[0])
        if site.in_features in tensor.shape
    )
    return Repeat(holder, tensor, weights, certain=False) if weights else None
