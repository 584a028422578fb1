"""The adapters that a session served last, and what they change together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lorafx.adapter_store.store import StoredAdapter


class Served(NamedTuple):
    """Adapters, and the sites that they touch, that they rescale, of whose weight they have rows of
    their own, and to whose outputs they add a bias; and one of them that begins at a token
    (aLoRA)."""

    adapters: tuple[StoredAdapter, ...] = ()
    touched: frozenset[str] = frozenset()
    rescaled: frozenset[str] = frozenset()
    owned: frozenset[str] = frozenset()
    shifted: frozenset[str] = frozenset()
    begins: StoredAdapter | None = None

    @classmethod
    def of(cls, adapters: Sequence[StoredAdapter]) -> Served:
        """What these adapters change."""
        return cls(
            tuple(adapters),
            frozenset().union(*(adapter.sites for adapter in adapters)),
            frozenset().union(*(adapter.rescaled for adapter in adapters)),
            frozenset().union(*(adapter.owned for adapter in adapters)),
            frozenset().union(*(adapter.shifted for adapter in adapters)),
            next((adapter for adapter in adapters if adapter.invocation), None),
        )
