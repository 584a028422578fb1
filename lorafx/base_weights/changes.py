"""Which tensors of a model hold W + ΔW once an adapter is merged, and which cannot.

    the weight of each touched site        W ← W + ΔW
    its bias                               b ← b + s·b_B, or b'
    views of it (packed buffers, W_UK)     change with it
    copies of it (W_UK made contiguous)    t ← (W + ΔW)[form], cast to the copy's dtype

    quantised weights                      W' = requantise(dequantise(W) + ΔW), where asked for

A tensor that several modules hold is one tensor: it can be changed where every end gets the same
ΔW. Everything that cannot be changed correctly is found for all sites at once, before anything is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorafx.base_weights.copies import Repeat, repeats
from lorafx.base_weights.deltas import BiasDelta, Delta, deltas_of
from lorafx.errors import MatchError
from lorafx.model.convolutions import unmergeable
from lorafx.model.module_graph import storage_key
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site
from lorafx.program.derived import Holder, overlap
from lorafx.program.weight_forms import Axis, WeightForm
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.adapter_store.store import AdapterStore
    from lorafx.program.program import Program


@dataclass(frozen=True, eq=False)
class Copy:
    """A tensor that holds a copy of part of a weight."""

    holder: Holder
    tensor: Tensor
    form: WeightForm


@dataclass(frozen=True, eq=False)
class Change:
    """One base tensor that an adapter changes.

    Attributes:
        holder: the module and attribute of the first site that holds it.
        weight: the tensor.
        delta: what is added to it.
        ends: the holders of this very tensor, or of the same storage, that use it as a weight of
            their own, `holder` among them, each with its ΔW; more than one where it is tied.
        copies: tensors that hold copies of parts of it.
    """

    holder: Holder
    weight: Tensor
    delta: Delta
    ends: tuple[tuple[Holder, Delta | None], ...]
    copies: tuple[Copy, ...] = ()

    @property
    def dense(self) -> Tensor:
        """W (N, K), (V, D) of an embedding, as it is now."""
        weight = self.weight.detach()
        return weight.mT if self.delta.site.eligible.transposed else weight

    @property
    def tied_apart(self) -> bool:
        """Whether the ends do not all get the same ΔW, so that one tensor cannot hold the sums."""
        return any(
            delta is not self.delta and (delta is None or not delta.same_as(self.delta))
            for _, delta in self.ends
        )


@dataclass(frozen=True, eq=False)
class StoredChange:
    """A weight that is changed through the format in which its module stores it."""

    holder: Holder
    delta: Delta
    copies: tuple[Copy, ...] = ()


class Changes(NamedTuple):
    """All that an adapter changes."""

    plain: list[Change]
    stored: list[StoredChange]


@dataclass
class _Found:
    """What is known of a model's tensors: who holds what, by storage."""

    program: Program
    by_storage: dict[int, list[tuple[Holder, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, module in self.program.graph.modules():
            for place in (module._parameters, module._buffers, vars(module)):
                for name, value in place.items():
                    if isinstance(value, Tensor):
                        held = Holder(path, module, name), value
                        self.by_storage.setdefault(storage_key(value), []).append(held)

    def holder(self, site: Site) -> Holder | None:
        """Where the site's weight is; None where it is computed whenever it is asked for."""
        weight = self.program.weight_of(site)
        for place in (site.module._parameters, site.module._buffers, vars(site.module)):
            if weight is not None and place.get(site.eligible.weight) is weight:
                return _holder(site)
        return None

    def overlapping(self, weight: Tensor) -> Iterator[tuple[Holder, Tensor]]:
        """Holders of tensors that have memory in common with `weight`."""
        for holder, tensor in self.by_storage.get(storage_key(weight), ()):
            if tensor is weight or overlap(tensor, weight):
                yield holder, tensor


def changes_of(
    program: Program, store: AdapterStore, name: str, *, requantize: bool = False
) -> Changes:
    """What merging the adapter `name` changes, in the order of the model's sites.

    Tied tensors whose ends get different ΔW are in the list (`Change.tied_apart`): whether they can
    be told apart is for the caller to say.

    Args:
        requantize: quantised weights may be stored anew in their own format.

    Raises:
        UnknownAdapterError: it is not loaded.
        MatchError: some weight cannot take its ΔW; names all of them. Or it is an aLoRA adapter.
    """
    if store[name].invocation:
        raise MatchError(
            f"adapter {name!r} cannot be merged: it is an aLoRA adapter, which leaves the tokens "
            "before its invocation to the base, so no weight is W + ΔW for all of them. Serve it "
            "without merging"
        )
    order = {id(site): number for number, site in enumerate(program.sites)}
    deltas = deltas_of(program.groups, store.numbers(name))
    deltas.sort(key=lambda delta: order[id(delta.site)])
    found, problems = _Found(program), list[str]()
    by_end: dict[tuple[int, str], Delta] = {}
    for delta in deltas:
        problem = _problem(program, found, delta, requantize=requantize)
        if problem:
            problems.append(f"{delta.site.path or 'the root module'}: {problem}")
        by_end[id(delta.site.module), delta.site.eligible.weight] = delta
    if problems:
        raise not_mergeable(name, problems)
    plain: dict[int, Change] = {}
    stored: list[StoredChange] = []
    ended: set[tuple[int, str]] = set()
    copies = _copies_by_site(program, [delta.site for delta in deltas], problems)
    for delta in deltas:
        holder, weight = _holder(delta.site), program.weight_of(delta.site)
        of_bias = BiasDelta.of(delta)
        if of_bias is not None:  # a plain one also where the weight is quantised, or tied
            bias = Holder(holder.path, holder.module, "bias")
            plain[id(bias.tensor)] = Change(bias, bias.tensor, of_bias, ((bias, of_bias),))
        if _key(holder) in ended:
            continue
        own = tuple(copies.get(id(delta.site), ()))
        if _is_stored(delta.site):
            stored.append(StoredChange(holder, delta, own))
            continue
        assert weight is not None
        ends = _ends(program, found, holder, weight, by_end)
        ended.update(_key(end) for end, _ in ends)
        plain[id(weight)] = Change(holder, weight, delta, ends, own)
    if problems:
        raise not_mergeable(name, problems)
    return Changes(list(plain.values()), stored)


def _copies_by_site(
    program: Program, sites: Sequence[Site], problems: list[str]
) -> dict[int, list[Copy]]:
    """The copies that have to follow, by the site, among those of one weight, that comes first.

    What repeats numbers of these weights in no form would keep the old ones: a problem.
    """
    copies: dict[int, list[Copy]] = {}
    follow = {storage_key(w) for site in sites if (w := program.weight_of(site)) is not None}
    others = []
    for repeat in repeats(program, parameters=True):
        touched = _touched(program, repeat, sites)
        if not touched or not repeat.certain:
            continue
        if repeat.form is None:
            others.append((repeat, touched))
            continue
        copy = Copy(repeat.holder, repeat.tensor, repeat.form)
        copies.setdefault(id(touched[0]), []).append(copy)
        follow.add(storage_key(repeat.tensor))
    for repeat, touched in others:
        if storage_key(repeat.tensor) not in follow:
            names = ", ".join(site.path for site in touched)
            problems.append(
                f"{names}: {repeat.holder} was made from it, and would keep the old numbers"
            )
    return copies


def _touched(program: Program, repeat: Repeat, sites: Sequence[Site]) -> list[Site]:
    """The sites whose weights, tied ones too, the tensor repeats; one for each place of one."""
    ends = {_key(weight.holder) for weight in repeat.weights}
    holders = [weight.holder for weight in repeat.weights]
    tensors = [getattr(holder.module, holder.attribute, None) for holder in holders]
    found = {}
    for site in reversed(sites):
        key, own = _key(_holder(site)), program.weight_of(site)
        if key in ends or any(own is tensor is not None for tensor in tensors):
            found[key] = site
    return list(reversed(found.values()))


def not_mergeable(name: str, problems: Sequence[str]) -> MatchError:
    """The refusal of a merge, with a line for each site that cannot be merged."""
    return MatchError(
        f"adapter {name!r} cannot be merged, and nothing has changed:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + "\nServe it without merging, or take these modules out by exclude_modules"
    )


def _key(holder: Holder) -> tuple[int, str]:
    return id(holder.module), holder.attribute


def _holder(site: Site) -> Holder:
    path = site.path if site.expert_weight is None else site.path.rpartition(".")[0]
    return Holder(path, site.module, site.eligible.weight)


def _is_stored(site: Site) -> bool:
    """Whether the module holds W in a format of its own, in place of W's numbers."""
    return is_stored(site.module, site.eligible)


def _problem(program: Program, found: _Found, delta: Delta, *, requantize: bool) -> str | None:
    """Why the site's weight cannot take ΔW."""
    site = delta.site
    weight = program.weight_of(site)
    if site.eligible.kind == "conv" and (why := unmergeable(site.module)):
        return f"the adapter adds no change of its weight: {why}"
    if BiasDelta.of(delta) is not None and (why := _fixed_bias(found, site)):
        return f"the adapter adds a bias (lora_bias, bias), and {why}"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device"
    if site.path in program.replaced:
        return "the module above it computes with a tensor that may have been made from its weight"
    if _is_stored(site):
        if not requantize:
            return (
                "its weight is quantised; merge(name, requantize=True) stores W + ΔW in "
                "that format and reports how much of ΔW is lost"
            )
        if weight is not None and len(list(found.overlapping(weight))) > 1:
            return "its weight is quantised and tied to another"
        return None
    if found.holder(site) is None or weight is None:
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


def _fixed_bias(found: _Found, site: Site) -> str | None:
    """Why the site's bias cannot be changed, or None where it can."""
    bias = site.module._parameters.get("bias")
    if bias is None:
        return "the base has no parameter to merge it into"
    others = [str(h) for h, t in found.overlapping(bias) if h.module is not site.module]
    return f"{', '.join(others)} is the same tensor as the base's" if others else None


def _ends(
    program: Program,
    found: _Found,
    holder: Holder,
    weight: Tensor,
    by_end: Mapping[tuple[int, str], Delta],
) -> tuple[tuple[Holder, Delta | None], ...]:
    """The holders that use the tensor as a weight of their own, and what each would add.

    A view that a module keeps beside its weights is no end: it is part of W, and changes with it.
    """
    sites = {(id(site.module), site.eligible.weight) for site in program.sites}
    ends = []
    for other, tensor in found.overlapping(weight):
        whole = tensor.shape == weight.shape and tensor.data_ptr() == weight.data_ptr()
        entry = lookup(other.module)
        own = _key(other) in sites or (entry is not None and other.attribute == entry.weight)
        own |= whole and other.attribute in other.module._parameters
        if own and (other.module is not holder.module or other.attribute == holder.attribute):
            # A slice of the weight in another module cannot get the same ΔW as the whole.
            ends.append((other, by_end.get(_key(other)) if whole else None))
    return tuple(ends)


def copied(dense: Tensor, copy: Copy) -> Tensor:
    """What the copy holds of W (N, K): t[k_0, …] = W[o₀ + Σ k_d · out_d, i₀ + Σ k_d · into_d]."""
    rows = _places(copy, copy.form.out, lambda axis: axis.out)
    columns = _places(copy, copy.form.into, lambda axis: axis.into)
    return dense[rows.to(dense.device), columns.to(dense.device)].to(copy.tensor.dtype)


def _places(copy: Copy, start: int, step_of: Callable[[Axis], int]) -> Tensor:
    """(sizes of the copy, or 1 where nothing changes) indices into one dimension of W."""
    dims = copy.tensor.dim()
    places = torch.full((1,) * dims, start)
    for dim, (size, axis) in enumerate(zip(copy.tensor.shape, copy.form.axes, strict=True)):
        index = torch.arange(size)
        if axis.period:
            index = index % axis.period
        shape = [1] * dims
        shape[dim] = size
        places = places + (index * step_of(axis)).view(shape)
    return places
