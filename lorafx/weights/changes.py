"""Which tensors of a model hold W + ΔW once an adapter is merged, and which cannot.

    the weight of each touched site        W ← W + ΔW
    its bias                               b ← b + s·b_B, or b'
    views of it (packed buffers, W_UK)     change with it
    quantised weights                      W' = requantise(dequantise(W) + ΔW), where asked for

A tied tensor can be changed where every end gets the same ΔW. Everything that cannot be changed is
found for all sites at once, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafx.errors import MatchError
from lorafx.model.convolutions import unmergeable
from lorafx.model.module_graph import storage_key
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site
from lorafx.program.derived import Holder, named_tensors, overlap
from lorafx.registry import lookup
from lorafx.weights.deltas import BiasDelta, Delta, deltas_of

if TYPE_CHECKING:
    from lorafx.adapter_store.store import AdapterStore
    from lorafx.program.program import Program


@dataclass(frozen=True, eq=False)
class Change:
    """One base tensor that an adapter changes.

    Attributes:
        holder: the module and attribute of the first site that holds it.
        weight: None where the module stores it in a format of its own.
        ends: the holders that use this tensor, or part of it, as their weight, `holder` among
            them, each with its ΔW; several where it is tied.
    """

    holder: Holder
    weight: Tensor | None
    delta: Delta
    ends: tuple[tuple[Holder, Delta | None], ...] = ()

    @property
    def tensor(self) -> Tensor:
        assert self.weight is not None
        return self.weight

    @property
    def parameter(self) -> str | None:
        """The name that `dequantize` takes for one of several weights of a module."""
        return None if self.delta.site.expert_weight is None else self.holder.attribute

    @property
    def tied_apart(self) -> bool:
        """Whether ends get different ΔW, so that one tensor cannot hold the sums."""
        return any(
            delta is not self.delta and (delta is None or not delta.same_as(self.delta))
            for _, delta in self.ends
        )


class _Tensors:
    def __init__(self, program: Program) -> None:
        self._held: dict[int, list[tuple[Holder, Tensor]]] = {}
        for path, module in program.graph.modules():
            for name, value in named_tensors(module):
                held = Holder(path, module, name), value
                self._held.setdefault(storage_key(value), []).append(held)

    def has(self, module: nn.Module, tensor: Tensor) -> bool:
        """Whether the module itself holds the tensor, and does not compute it on each access."""
        found = self._held.get(storage_key(tensor), ())
        return any(holder.module is module and value is tensor for holder, value in found)

    def overlapping(self, weight: Tensor) -> Iterator[tuple[Holder, Tensor]]:
        for holder, tensor in self._held.get(storage_key(weight), ()):
            if tensor is weight or overlap(tensor, weight):
                yield holder, tensor


def changes_of(
    program: Program, store: AdapterStore, name: str, *, requantize: bool = False
) -> list[Change]:
    """What merging the adapter `name` changes, in the order of sites. MatchError names all weights
    that cannot take their ΔW. `requantize`: quantised weights may be stored anew."""
    if store[name].invocation:
        raise MatchError(
            f"adapter {name!r} cannot be merged: it is an aLoRA adapter, which leaves the tokens "
            "before its invocation to the base, so no weight is W + ΔW for all of them. Serve it "
            "without merging"
        )
    order = {id(site): number for number, site in enumerate(program.sites)}
    deltas = deltas_of(program.groups, store[name])
    deltas.sort(key=lambda delta: order[id(delta.site)])
    tensors, problems = _Tensors(program), list[str]()
    for delta in deltas:
        problem = _problem(program, tensors, delta, requantize=requantize)
        if problem:
            problems.append(f"{delta.site.path or 'the root module'}: {problem}")
    if problems:
        raise not_mergeable(name, problems)
    by_end = {key_of(_holder(delta.site)): delta for delta in deltas}
    changes: list[Change] = []
    ended: set[tuple[int, str]] = set()
    for delta in deltas:
        holder = _holder(delta.site)
        of_bias = BiasDelta.of(delta)
        if of_bias is not None:  # a plain one also where the weight is quantised, or tied
            bias = Holder(holder.path, holder.module, "bias")
            changes.append(Change(bias, bias.tensor, of_bias, ((bias, of_bias),)))
        if key_of(holder) in ended:
            continue
        if is_stored(delta.site.module, delta.site.eligible):
            changes.append(Change(holder, None, delta))
            continue
        ends = _ends(program, tensors, holder, by_end)
        ended.update(key_of(end) for end, _ in ends)
        changes.append(Change(holder, holder.tensor, delta, ends))
    return changes


def not_mergeable(name: str, problems: Sequence[str]) -> MatchError:
    return MatchError(
        f"adapter {name!r} cannot be merged, and nothing has changed:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + "\nServe it without merging, or take these modules out by exclude_modules"
    )


def key_of(holder: Holder) -> tuple[int, str]:
    return id(holder.module), holder.attribute


def _holder(site: Site) -> Holder:
    path = site.path if site.expert_weight is None else site.path.rpartition(".")[0]
    return Holder(path, site.module, site.eligible.weight)


def _problem(program: Program, tensors: _Tensors, delta: Delta, *, requantize: bool) -> str | None:
    site = delta.site
    weight = program.weight_of(site)
    if site.eligible.kind == "conv" and (why := unmergeable(site.module)):
        return f"the adapter adds no change of its weight: {why}"
    if BiasDelta.of(delta) is not None and (why := _fixed_bias(tensors, site)):
        return f"the adapter adds a bias (lora_bias, bias), and {why}"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device"
    if site.path in program.replaced:
        return "the module above it computes with a tensor that may have been made from its weight"
    if is_stored(site.module, site.eligible):
        if not requantize:
            return (
                "its weight is quantised; merge(name, requantize=True) stores W + ΔW in "
                "that format and reports how much of ΔW is lost"
            )
        if weight is not None and len(list(tensors.overlapping(weight))) > 1:
            return "its weight is quantised and tied to another"
        return None
    if weight is None or not tensors.has(site.module, weight):
        return "its weight is computed on each access (a parametrisation)"
    if delta.own is not None and delta.own.bias is not None:
        held = getattr(site.module, "bias", None)
        if held is None:
            return "the adapter's own weight has fewer outputs"
        if not torch.equal(held.detach().cpu(), delta.own.bias.to(held.dtype)):
            return "the adapter has a bias of its own"
    if tuple(weight.shape) != delta.shape:
        return f"its weight has shape {tuple(weight.shape)}, but ΔW has {delta.shape}"
    return None


def _fixed_bias(tensors: _Tensors, site: Site) -> str | None:
    bias = site.module._parameters.get("bias")
    if bias is None:
        return "the base has no parameter to merge it into"
    others = [str(h) for h, t in tensors.overlapping(bias) if h.module is not site.module]
    return f"{', '.join(others)} is the same tensor as the base's" if others else None


def _ends(
    program: Program,
    tensors: _Tensors,
    holder: Holder,
    by_end: Mapping[tuple[int, str], Delta],
) -> tuple[tuple[Holder, Delta | None], ...]:
    """Holders that use the tensor as a weight, and what each would add; views change with it."""
    sites = {key_of(_holder(site)) for site in program.sites}
    weight, ends = holder.tensor, []
    for other, tensor in tensors.overlapping(weight):
        whole = tensor.shape == weight.shape and tensor.data_ptr() == weight.data_ptr()
        entry = lookup(other.module)
        is_weight = key_of(other) in sites or (
            entry is not None and other.attribute == entry.weight
        )
        is_weight |= whole and other.attribute in other.module._parameters
        if is_weight and (other.module is not holder.module or other.attribute == holder.attribute):
            # A slice of the weight in another module cannot get the same ΔW as the whole.
            ends.append((other, by_end.get(key_of(other)) if whole else None))
    return tuple(ends)
