"""The part of the store that is about names: which version of an adapter each one means.

    keep      a version under its name; one that requests hold goes on under a name of its own
    sums      adapters of their own, made of loaded ones when a batch asks for them, and forgotten
              with any of these
    trim      host memory is kept within its budget

The store's lock is held by whoever calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from lorafx.adapter_store.holding import Hold, Retired
from lorafx.adapter_store.mixing import mixed
from lorafx.adapter_store.names import Mixture, members
from lorafx.adapter_store.slots import Slots
from lorafx.interrupts import undisturbed

if TYPE_CHECKING:
    from lorafx.adapter_store.host_copies import HostTier
    from lorafx.adapter_store.stored import StoredAdapter
    from lorafx.model.sites import Group


class Versions(Slots):
    """Adapters by name over the slots of `groups`; arguments as of `Slots`."""

    def __init__(
        self, groups: Sequence[Group], max_adapters: int, own_weights: int, host: HostTier
    ) -> None:
        super().__init__(groups, max_adapters, own_weights, host)
        # Versions that requests hold though they were replaced or unloaded, and their names.
        self._held: WeakSet[Hold] = WeakSet()
        self._retired: dict[int, Retired] = {}

    def _keep(self, stored: StoredAdapter) -> None:
        self._last = None
        self._unmix(stored.name)
        self._retire(stored.name)
        self._replace(stored)
        before = self._adapters.get(stored.name)
        if before is not None:
            self.host.forget(before)
        self._adapters[stored.name] = stored
        self.host.add(stored)

    def _retire(self, name: str) -> None:
        """Give a version that requests hold, and its slot, a name of its own."""
        self._let_go()
        stored = self._adapters.get(name)
        if stored is None or not any(hold.stored is stored for hold in list(self._held)):
            return
        self._last = None
        stored.host = self.host.get(stored)  # which the request holds
        self.host.forget(stored)
        kept = self._retired[stored.version] = Retired(stored)
        self._adapters[kept] = self._adapters.pop(name)
        if name in self._slots:
            self._slots[kept] = self._slots.pop(name)

    def _let_go(self) -> None:
        """Forget the retired versions that nobody holds any more."""
        if not self._retired or self._aside is not None:
            return
        held = {hold.stored.version for hold in list(self._held)}
        for version in self._retired.keys() - held:
            self._forget(self._retired.pop(version))

    def _forget(self, name: str) -> None:
        self._last = None
        self._pinned.discard(name)
        if name not in self._adapters:  # retired
            return
        self.host.forget(self._adapters.pop(name))
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._clear(slot)

    def _unload(self, name: str) -> None:
        self._unmix(name)
        self._retire(name)
        self._forget(name)

    def _mix(self, names: Sequence[str]) -> None:
        """Make the sums among `names`, whose adapters are loaded. Of earlier ones that have no slot
        the last few are kept."""
        missing = [n for n in names if isinstance(n, Mixture) and n not in self._adapters]
        if not missing:
            return
        sums = [name for name in self._adapters if isinstance(name, Mixture)]
        idle = [name for name in sums if name not in self._slots and name not in names]
        for name in idle[: max(0, len(idle) - self.max_adapters)]:
            undisturbed(partial(self._unload, name))
        summed = dict.fromkeys(own for name in missing for own in members(name))
        copies = {own: self.host.numbers(self._adapters[own]) for own in summed}
        for name in missing:
            stored = mixed(name, self._adapters, copies, self._groups)
            self._adapters[name] = stored
            self.host.add(stored)

    def _unmix(self, name: str) -> None:
        """Forget the sums that an adapter is part of."""
        sums = [own for own in self._adapters if isinstance(own, Mixture) and name in members(own)]
        for own in sums:
            self._unload(own)

    def _trim(self) -> None:
        """Keep host memory within the budget: sums can be made again, and most adapters read."""
        host = self.host
        if not host.over or self._aside is not None:
            return
        held = {hold.stored.version for hold in list(self._held)}
        for name in [n for n in self._adapters if isinstance(n, Mixture) and n not in self._slots]:
            if self._adapters[name].version not in held:
                undisturbed(partial(self._unload, name))
        undisturbed(lambda: host.trim(lambda stored: stored.name in self._pinned))
