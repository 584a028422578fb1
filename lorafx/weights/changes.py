"""The weights that merging an adapter changes, each with its change ΔW (lorafx.weights.delta).

Views of a weight (packed buffers, W_UK) change with it. A tied tensor can be changed if all modules
that use it get the same ΔW. All weights that cannot change are found before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafx.adapter_store.names import Arrow
from lorafx.errors import MatchError, itemised
from lorafx.model.attachment import marks_on
from lorafx.model.convolutions import unmergeable
from lorafx.model.extras import bias_of
from lorafx.model.made_weights import maker_of
from lorafx.model.marks import SiteMark
from lorafx.model.module_graph import ByStorage, Holder
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site
from lorafx.placements import is_placed, local
from lorafx.program.derived import named_tensors
from lorafx.registry import lookup
from lorafx.weights.delta import BiasDelta, Delta, deltas_of

if TYPE_CHECKING:
    from lorafx.adapter_store.store import AdapterStore
    from lorafx.program.program import Program


@dataclass(frozen=True, eq=False)
class Change:
    """One base tensor that an adapter changes.

    Attributes:
        holder: the module and attribute of the first site that holds it.
        weight: the tensor; None if the module stores it in a format.
        ends: all holders that use the tensor, or a part of it, as their weight, each with its ΔW;
            several if it is tied.
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
        """The weight's name for `dequantize`, if its module holds several weights."""
        return None if self.delta.site.expert_weight is None else self.holder.attribute

    @property
    def tied_apart(self) -> bool:
        """Whether ends get different ΔW, which one tensor cannot hold."""
        return any(
            delta is not self.delta and (delta is None or not delta.same_as(self.delta))
            for _, delta in self.ends
        )


def _held(program: Program) -> Iterator[tuple[Holder, Tensor]]:
    for path, module in program.graph.modules():
        for name, value in named_tensors(module):
            yield Holder(path, module, name), local(value)


def changes_of(
    program: Program, store: AdapterStore, name: str, *, requantize: bool = False
) -> list[Change]:
    """The changes of merging the adapter `name`, in the order of sites. Raises MatchError, which
    names all weights that cannot be changed. `requantize`: quantised weights may be requantised."""
    if isinstance(name, Arrow):
        raise MatchError(
            f"{name!r} chooses adapters for each token, so no weight is W + ΔW for all of them; "
            "name one of its adapters, or serve it without merging"
        )
    if store[name].invocation:
        raise MatchError(
            f"adapter {name!r} cannot be merged: it is an aLoRA adapter, which leaves the tokens "
            "before its invocation to the base, so no weight is W + ΔW for all of them. Serve it "
            "without merging"
        )
    order = {id(site): number for number, site in enumerate(program.sites)}
    deltas = deltas_of(program.groups, store[name])
    deltas.sort(key=lambda delta: order[id(delta.site)])
    tensors, problems = ByStorage(_held(program)), list[str]()
    for delta in deltas:
        problem = _refusal(program, tensors, delta, requantize=requantize)
        if problem:
            problems.append(f"{delta.site.path or 'the root module'}: {problem}")
    if problems:
        raise not_mergeable(name, problems)
    by_end = {key_of(_holder(delta.site)): delta for delta in deltas}
    changes: list[Change] = []
    covered: set[tuple[int, str]] = set()
    for delta in deltas:
        holder = _holder(delta.site)
        bias_delta = BiasDelta.of(delta)
        if bias_delta is not None:  # a plain tensor, even if the weight is quantised or tied
            bias = Holder(holder.path, holder.module, "bias")
            changes.append(Change(bias, bias.local, bias_delta, ((bias, bias_delta),)))
        if key_of(holder) in covered:
            continue
        if is_stored(delta.site.module, delta.site.eligible):
            changes.append(Change(holder, None, delta))
            continue
        ends = _ends(program, tensors, holder, by_end)
        covered.update(key_of(end) for end, _ in ends)
        changes.append(Change(holder, holder.local, delta, ends))
    return changes


def not_mergeable(name: str, problems: Sequence[str]) -> MatchError:
    return MatchError(
        itemised(
            f"adapter {name!r} cannot be merged, and nothing has changed",
            problems,
            "Serve it without merging, or take these modules out by exclude_modules",
        )
    )


def key_of(holder: Holder) -> tuple[int, str]:
    return id(holder.module), holder.attribute


def _holder(site: Site) -> Holder:
    path = site.path if site.expert_weight is None else site.path.rpartition(".")[0]
    return Holder(path, site.module, site.eligible.weight)


def _refusal(
    program: Program, tensors: ByStorage[Holder], delta: Delta, *, requantize: bool
) -> str | None:
    site = delta.site
    weight = program.weight_of(site)
    weight = None if weight is None else local(weight)
    if site.eligible.kind == "conv" and (why := unmergeable(site.module)):
        return f"the adapter adds no change of its weight: {why}"
    if BiasDelta.of(delta) is not None and (why := _bias_refusal(tensors, site)):
        return f"the adapter adds a bias (lora_bias, bias), and {why}"
    own_bias = None if delta.own_weight is None else delta.own_weight.bias
    if own_bias is not None and (why := _own_bias_refusal(site, own_bias)):
        return why
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
        if weight is not None and len(tensors.overlapping(weight)) > 1:
            return "its weight is quantised and tied to another"
        return None
    maker = maker_of(site.module, site.eligible.weight)
    holders = () if weight is None else tensors.beside(weight)
    held = any(h.module is site.module and tensor is weight for h, tensor in holders)
    if maker or weight is None or not held:
        return f"its weight is computed anew for each call, by {maker or 'a property'}"
    if tuple(weight.shape) != delta.shape:
        return f"its weight has shape {tuple(weight.shape)}, but ΔW has {delta.shape}"
    return _changed_input(program, site) if program.options.delta_of == "argument" else None


def _changed_input(program: Program, site: Site) -> str | None:
    """Why W + ΔW would not be what the adapter adds: the module multiplies by something else than
    its argument. Where no graph shows it, the module is asked."""
    if site.path in program.changed_inputs:
        return (
            "its forward changes its input before it multiplies it by its weight, and the adapter "
            "adds the delta of its argument, which is no change of the weight; compile with "
            'Options(delta_of="weight") if W + ΔW is meant'
        )
    if (
        not site.may_change_input
        or site.path in program.reached
        or is_placed(program.weight_of(site))
    ):
        return None
    if any(
        isinstance(m, SiteMark) and not m.takes_argument(site.module) for m in marks_on(site.marked)
    ):
        return (
            "its class overrides forward, and no graph has shown yet what it multiplies by its "
            "weight; call the model with this adapter first"
        )
    return None


_NO_BIAS = "the base has no parameter to merge it into"


def _own_bias_refusal(site: Site, own: Tensor) -> str | None:
    """Why a weight cannot be merged with the bias beside it: the base's is not changed."""
    bias = bias_of(site)
    if bias is None and bool(own.isneginf().any()):
        return "the adapter's own weight has fewer outputs"
    if bias is None:
        return f"the adapter adds a bias, and {_NO_BIAS}"
    same = torch.equal(bias.cpu(), own.to(bias.cpu()))
    return None if same else "the adapter has a bias of its own"


def _bias_refusal(tensors: ByStorage[Holder], site: Site) -> str | None:
    bias = site.module._parameters.get("bias")
    if bias is None:
        return _NO_BIAS
    holders = [str(h) for h, t in tensors.overlapping(bias) if h.module is not site.module]
    return f"{', '.join(holders)} is the same tensor as the base's" if holders else None


def _ends(
    program: Program,
    tensors: ByStorage[Holder],
    holder: Holder,
    by_end: Mapping[tuple[int, str], Delta],
) -> tuple[tuple[Holder, Delta | None], ...]:
    """The holders that use the tensor of `holder` as a weight, each with its ΔW."""
    site_keys = {key_of(_holder(site)) for site in program.sites}
    weight, ends = holder.local, []
    for other, tensor in tensors.overlapping(weight):
        is_whole = tensor.shape == weight.shape and tensor.data_ptr() == weight.data_ptr()
        entry = lookup(other.module)
        is_weight = key_of(other) in site_keys or (
            entry is not None and other.attribute == entry.weight
        )
        is_weight |= is_whole and other.attribute in other.module._parameters
        if is_weight and (other.module is not holder.module or other.attribute == holder.attribute):
            # A slice of the weight in another module cannot get the same ΔW as the whole.
            ends.append((other, by_end.get(key_of(other)) if is_whole else None))
    return tuple(ends)
