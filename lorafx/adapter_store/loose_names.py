"""Names in a packed module whose slices only the row counts of an adapter's factors determine.

    slices [8, 8, 8, 8];  in_proj_qkv with 24 rows, in_proj_z with 8  →  slices 0, 1, 2 and slice 3

All names of one adapter are looked at together (lorafx.model.partition).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafx.adapter_store.peft_keys import FactorKey
from lorafx.adapter_store.places import SiteLanding, saved_sizes
from lorafx.model.packed_names import renamed
from lorafx.model.partition import spans

#: Rows of B by loose name, by the identity of the packed site.
RowCounts = Mapping[int, Mapping[str, int]]


def given_rows(
    landings: Mapping[object, SiteLanding],
    factors: Mapping[object, Mapping[str, FactorKey]],
    tensors: Mapping[str, Tensor],
) -> RowCounts:
    """What a file has for loose names."""
    found: dict[int, dict[str, int]] = {}
    for meant, landing in landings.items():
        if landing.loose and "B" in factors[meant]:
            b = tensors[factors[meant]["B"].key]
            own = found.setdefault(id(landing.places[0][0]), {})
            own[landing.loose] = b.shape[0] if b.dim() == 2 else 0
    return found


def undivided(landing: SiteLanding, rows: RowCounts) -> str:
    """Which slices there are, and what the names of `landing`'s site have to do with them."""
    sizes = [saved_sizes(place)[1] for place in landing.places]
    named = ", ".join(
        f"{site.part_path(i).rpartition('.')[2]} {size}"
        for (site, i), size in zip(landing.places, sizes, strict=True)
    )
    if not landing.loose:
        return f"it covers {named}, {sum(sizes)} rows in all"
    site = landing.places[0][0]
    given = rows.get(id(site), {})
    others = [name for name in site.loose_names if name != landing.loose]
    beside = ", ".join(
        f"{name} ({given[name]} rows here)" if name in given else name for name in others
    )
    return f"{landing.loose} takes some of {named}, while {beside} takes all others"


def settled(landing: SiteLanding, rows: RowCounts) -> dict[str, range]:
    """The slices of each loose name of `landing`'s site, by its path, that the rows leave no doubt
    about: also of names that the file has no factors for."""
    if not landing.loose:
        return {}
    site = landing.places[0][0]
    sizes = [saved_sizes(place)[1] for place in landing.places]
    given = rows.get(id(site), {})
    found = spans(sizes, [given.get(name) for name in site.loose_names])
    return {
        renamed(site.path, name): range(*next(iter(own)))
        for name, own in zip(site.loose_names, found, strict=True)
        if len(own) == 1
    }
