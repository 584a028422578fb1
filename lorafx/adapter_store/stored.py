"""What the store keeps of an adapter, and where its factors go in the banks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor

from lorafx.adapter_store.host_copies import HostCopy
from lorafx.adapter_store.origins import Origin
from lorafx.errors import CheckpointError
from lorafx.model.bank import Factors

if TYPE_CHECKING:
    from lorafx.adapter_store.reading import LoraWeights
    from lorafx.model.sites import Group, Site


#: The version of an adapter that is stored now.
next_version = itertools.count(1).__next__


@dataclass(eq=False)
class StoredAdapter:
    """A loaded adapter. Only its host copy comes and goes (lorafx.adapter_store.host_copies).

    Attributes:
        name, rank, source, notes: as in `Adapter`.
        sites: canonical paths of the sites that it touches.
        host: its numbers in host memory; None where they were dropped.
        rescaled: those of the sites whose outputs it rescales (DoRA).
        spans: as in `Adapter`.
        owned: those of the sites of whose weight it has rows of its own.
        shifted: those of the sites to whose outputs it adds a bias.
        invocation: as in `Adapter`.
        origin: where it can be read again; None where it cannot, or where the base weights as they
            are then would decide what its file means.
        keys: as in `Adapter`, where it cannot be read again.
        version: another number for each adapter that was loaded in this process, from 1 on.
        dropped: the copy that was dropped, as long as somebody uses it.
        width: how many slots it takes in a row.
    """

    name: str
    rank: int
    source: str
    sites: tuple[str, ...]
    host: HostCopy | None
    rescaled: tuple[str, ...] = ()
    spans: Mapping[str, range] = field(default_factory=dict)
    owned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    origin: Origin | None = None
    keys: Mapping[str, torch.Size] = field(default_factory=dict)
    version: int = field(default_factory=next_version)
    dropped: ReferenceType[HostCopy] | None = None
    width: int = 1

    @property
    def follows_base(self) -> bool:
        """Whether some of its numbers are taken again when base weights change."""
        return bool(self.rescaled or self.shifted)

    @property
    def nbytes(self) -> int:
        """Host memory that its numbers take now."""
        copy = self.host or (None if self.dropped is None else self.dropped())
        return 0 if copy is None else copy.nbytes


def check_spans(stored: StoredAdapter, others: Iterable[StoredAdapter]) -> None:
    """Raise CheckpointError unless a name of a packed module means the same slices in all
    adapters."""
    for other in others:
        for path in stored.spans.keys() & other.spans.keys():
            mine, theirs = stored.spans[path], other.spans[path]
            if mine != theirs and other.name != stored.name:
                raise CheckpointError(
                    f"adapter {stored.name!r} from {stored.source} has factors by whose rows "
                    f"{path} is slices {_listed(mine)} of what packs it, and by those of "
                    f"{other.name!r} slices {_listed(theirs)}: one of the two is for another "
                    "model; packed_modules may say which slices each name covers"
                )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def sharing(made: Factors, others: Iterable[Factors]) -> Factors:
    """`made`, holding the very A of another sibling that has the same."""
    for other in others:
        if other.A.shape == made.A.shape and torch.equal(other.A, made.A):
            return made._replace(A=other.A)
    return made


class BankPlace(NamedTuple):
    """Where the factors of one part of a site lie: its sibling and first column in the bank."""

    group: int
    site: Site
    part: int
    sibling: int
    offset: int


def places_of(groups: Sequence[Group]) -> dict[str, BankPlace]:
    """Where the factors of each part of a site lie, by its path."""
    return {
        site.part_path(part): BankPlace(g, site, part, *numbers)
        for g, group in enumerate(groups)
        for i, site in enumerate(group.sites)
        for part, numbers in enumerate(zip(*group.ranges(i)[:2], strict=True))
    }


def misfit(path: str, place: BankPlace, weights: LoraWeights, max_rank: int) -> str | None:
    rank, part = weights.rank, place.site.parts[place.part]
    want: tuple[tuple[int, ...], ...] = (rank, part.in_features), (part.out_features, rank)
    if place.site.expert_weight is not None:
        want = tuple((place.site.experts, *shape) for shape in want)
    max_rank *= place.site.terms
    have = tuple(weights.A.shape), tuple(weights.B.shape)
    if have != want or not 0 < rank <= max_rank:
        return f"{path}: factors {have} do not fit {want} with rank at most {max_rank}"
    return None


def host_copy(tensor: Tensor, dtype: torch.dtype, pin: bool) -> Tensor:
    """A contiguous copy on the host, page-locked where it is to be copied to a GPU."""
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=pin)
    return made.copy_(tensor.detach())


def all_factors(factors: dict[int, list[Factors]]) -> Iterator[Factors]:
    for group in factors.values():
        yield from group
