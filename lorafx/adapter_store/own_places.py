"""Where adapters' own weights lie in the banks, which have room for those of some slots at a time.

A place belongs to a slot as long as the slot holds an adapter with weights of its own; who holds
which slot is for the store to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorafx.errors import CapacityError


class OwnPlaces:
    """The places of `count` adapters with weights of their own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._by_slot: dict[int, int] = {}

    def free(self, slot: int, holding: Iterable[int]) -> int | None:
        """The place for `slot`: where it had one, or one that none of the slots `holding` has. None
        where there is none."""
        taken = {self._by_slot[other] for other in holding if other != slot}
        own = self._by_slot.get(slot)
        if own is not None and own not in taken:
            return own
        return min(set(range(self.count)).difference(taken), default=None)

    def take(self, slot: int, holding: Iterable[int]) -> int:
        """Give `slot` the place of `free`, which there is."""
        place = self.free(slot, holding)
        assert place is not None, f"slot {slot} was promised a place"
        self._by_slot[slot] = place
        return place

    def to_evict(
        self, missing: Sequence[str], resident: Sequence[str], evictable: Sequence[str]
    ) -> list[str]:
        """Those of `evictable` that have to make room for the own weights of `missing`, in their
        order. `resident` are all that have a place.

        Raises:
            CapacityError: that would not be enough.
        """
        lacking = len(missing) + len(resident) - self.count
        if not missing or lacking <= 0:
            return []
        made = [name for name in evictable if name in resident][:lacking]
        if len(made) < lacking:
            needed = self.count - len(made) + lacking
            raise CapacityError(
                f"no room for the own weights of {', '.join(missing)}: the banks hold those of at "
                f"most {self.count} at a time; compile with "
                f"LoraConfig(max_own_weights={needed}), unpin adapters, or split the batch"
            )
        return made
