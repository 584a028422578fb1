"""Adapters that requests under way hold: replaced or unloaded, they stay until those are done."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafx.adapter_store.host_copies import HostCopy
    from lorafx.adapter_store.stored import StoredAdapter


class Hold:
    """One version of an adapter, kept as long as this object lives, and so is its host copy
    (`AdapterStore.hold`)."""

    __slots__ = ("__weakref__", "name", "numbers", "stored")

    def __init__(self, name: str, stored: StoredAdapter, numbers: HostCopy) -> None:
        self.name = name
        self.stored = stored
        self.numbers = numbers


class Retired(str):
    """The name of a version that was replaced or unloaded.

    It is equal to itself alone: what is loaded, or asked for, under a name that reads the same is
    another adapter.
    """

    replaced: str

    def __new__(cls, stored: StoredAdapter) -> Retired:
        name = super().__new__(cls, f"{stored.name} (version {stored.version}, replaced)")
        name.replaced = stored.name
        return name

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


def staying(pinned: AbstractSet[str], wanted: Collection[str]) -> set[str]:
    """The adapters of those `pinned` that keep their slots beside those that are `wanted`."""
    return set(pinned) - (set(map(loaded_as, wanted)) - set(wanted))


def loaded_as(name: str) -> str:
    """The name under which an adapter was loaded. Where that is pinned, it and the versions that it
    replaced take turns in its slot."""
    return name.replaced if isinstance(name, Retired) else name
