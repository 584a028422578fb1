"""Adapters that requests under way hold: replaced or unloaded, they stay until those are done."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafx.adapter_store.stored import StoredAdapter


class Hold:
    """One version of an adapter, kept as long as this object lives (`AdapterStore.hold`)."""

    __slots__ = ("__weakref__", "name", "stored")

    def __init__(self, name: str, stored: StoredAdapter) -> None:
        self.name = name
        self.stored = stored
