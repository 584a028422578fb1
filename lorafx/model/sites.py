"""Sites and groups: the modules that carry LoRA, and what they share.

A *site* is one LoRA-eligible module instance. It has one *part*, or several if the module is packed
(`qkv_proj`), each of which may have its own factors. A *group* is a set of sibling sites (same
parent, kind, input size, dtype and device) whose factors lie in one bank, where each part is a
sibling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from lorafx.kernels.ops.op_library import Ranges
from lorafx.model.bank import Bank, SharedPair
from lorafx.model.experts import ExpertWeight
from lorafx.model.made_weights import has_weight
from lorafx.placements import forward_of
from lorafx.registry import Eligible


@dataclass(frozen=True)
class Part:
    """Output slices of a site with separate factors. `name` is the last name of its path in an
    adapter ("" for the module's own), which may have factors of it if it is `selected`."""

    name: str
    slices: tuple[int, ...]
    in_features: int
    out_features: int
    selected: bool = True


@dataclass(frozen=True)
class Membership:
    """A site's index in modules of other models that pack it: `v_proj` is 2 of 3 in `qkv_proj`."""

    name: str
    index: int
    count: int


@dataclass(frozen=True, eq=False)
class Site:
    """One module instance that may carry LoRA.

    Attributes:
        path: canonical dotted path from the root ("" for the root itself).
        module: the instance; never replaced or changed.
        eligible: the registry entry that matched, nearest along the MRO.
        in_features, out_features: K and N of the delta; for embeddings K is the vocabulary.
        dtype, device: of the base weight (the compute dtype where the weight is not floating).
        parts: the parts of its output columns, in order.
        member_of: the packed names that other models have for this module and its siblings.
        undeclared: names of a packed module that it does not declare the slices of; the rows of an
            adapter's B determine them.
        expert_weight: the parameter of routed experts that is the site, whose path it then has.
        own_rows: how many rows of the weight an adapter may replace.
        pair: what adapters may scale here, of the model's largest sizes.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    eligible: Eligible
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    parts: tuple[Part, ...] = ()
    member_of: tuple[Membership, ...] = ()
    undeclared: tuple[str, ...] = ()
    expert_weight: ExpertWeight | None = None
    own_rows: int = 0
    pair: SharedPair | None = None

    @property
    def weight_rows(self) -> int:
        return self.in_features if self.eligible.kind == "embedding" else self.out_features

    @property
    def experts(self) -> int:
        """E for a parameter that holds a weight for each of E experts; 1 for all others."""
        return 1 if self.expert_weight is None else self.expert_weight.experts

    @property
    def terms(self) -> int:
        """Low-rank terms in a part: up to two for interleaved gate and up."""
        weight = self.expert_weight
        return 2 if weight is not None and weight.halves == "interleaved" else 1

    def __post_init__(self) -> None:
        if not self.parts:
            whole = Part("", (0,), self.in_features, self.out_features)
            object.__setattr__(self, "parts", (whole,))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    def part_path(self, index: int) -> str:
        """The path of part `index` in messages and adapters: that of the module if unpacked."""
        if len(self.parts) == 1:
            return self.path
        name = self.parts[index].name
        parent = self.path.rpartition(".")[0]
        return f"{parent}.{name}".lstrip(".") if name else f"{self.path}[{index}]"

    @property
    def marked(self) -> nn.Module:
        """The module whose call the delta is added to, `module` or a child of it."""
        entry = self.eligible
        if entry.sharding is None or entry.handler is not None or self.has_own_forward:
            return self.module
        return entry.sharding.product(self.module)

    @property
    def may_change_input(self) -> bool:
        """Whether its forward may multiply something else than its argument, of which PEFT trains
        the delta. It trains that of the weight for parameters, and in nn.MultiheadAttention."""
        entry = self.eligible
        wrapped = entry.kind != "experts" and not entry.inner and entry.cls is not nn.Module
        return wrapped and entry.handler is None and self.has_own_forward

    @property
    def has_own_forward(self) -> bool:
        """Whether a subclass or the instance overrides the forward of the registered class."""
        return has_own_forward(self.module, self.eligible)


def has_own_forward(module: nn.Module, entry: Eligible) -> bool:
    """As `Site.has_own_forward`; also true if the registered forward does more than the product.
    A registered class without a forward leaves the product to its subclasses, which is known where
    they store their weight in a format."""
    forward = getattr(forward_of(module), "__func__", None)
    registered = entry.cls.forward
    if registered is nn.Module.forward and not has_weight(module, entry.weight):
        registered = type(module).forward
    return entry.inner or forward is not registered


def own_ranges(site: Site) -> Ranges:
    sizes = tuple(part.out_features for part in site.parts)
    return Ranges(tuple(range(len(sizes))), (0, *accumulate(sizes[:-1])), sizes)


def members_of(siblings: Sequence[Site]) -> tuple[str, ...]:
    """The last names of sibling sites; "(root)" for the model itself."""
    return tuple(site.path.rpartition(".")[2] or "(root)" for site in siblings)


@dataclass(frozen=True, eq=False)
class Group:
    """Sibling sites over one bank. `offsets[i]` is site i's first column in the bank's B."""

    sites: tuple[Site, ...]
    offsets: tuple[int, ...]
    bank: Bank

    @property
    def parent(self) -> str:
        return self.sites[0].path.rpartition(".")[0]

    @property
    def members(self) -> tuple[str, ...]:
        return members_of(self.sites)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The number in the bank of each site's first part."""
        return (0, *accumulate(len(site.parts) for site in self.sites[:-1]))

    def site_of(self, sibling: int) -> Site:
        return next(
            site
            for site, first in zip(self.sites, self.firsts, strict=True)
            if first <= sibling < first + len(site.parts)
        )

    def ranges(self, index: int) -> Ranges:
        siblings, offsets, sizes = own_ranges(self.sites[index])
        first, start = self.firsts[index], self.offsets[index]
        return Ranges(tuple(first + i for i in siblings), tuple(start + o for o in offsets), sizes)


def room_of(groups: Iterable[Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group.bank.room))
