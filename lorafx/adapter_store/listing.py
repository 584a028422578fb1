"""What is known of a loaded adapter, for its users."""

from __future__ import annotations

from dataclasses import dataclass

from lorafx.adapter_store.store import AdapterStore


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter.

    Attributes:
        name: what calls name it by.
        source: where it was read from.
        rank: the largest rank of its factors.
        sites: canonical paths of the modules that it changes.
        version: as in `CompiledModel.adapter_versions`.
        slot: its slot on the device; None where it is in host memory alone.
        pinned: whether it keeps that slot.
        nbytes: host memory that its numbers take now.
    """

    name: str
    source: str
    rank: int
    sites: tuple[str, ...]
    version: int
    slot: int | None
    pinned: bool
    nbytes: int


def info(store: AdapterStore, name: str) -> AdapterInfo:
    """What is known of the adapter of this name.

    Raises:
        UnknownAdapterError: it is not loaded.
    """
    stored = store[name]
    return AdapterInfo(
        name,
        stored.source,
        stored.rank,
        stored.sites,
        stored.version,
        store.resident.get(name),
        name in store.pinned,
        stored.nbytes,
    )
