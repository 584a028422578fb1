"""What a batch asks for and the store does not have: adapters by these names, or as many slots."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from lorafx.adapter_store.holding import loaded_as
from lorafx.adapter_store.names import Mixture, members
from lorafx.errors import CapacityError, ConfigError, UnknownAdapterError, nearest

if TYPE_CHECKING:
    from lorafx.adapter_store.stored import StoredAdapter


def check_loaded(
    names: Sequence[str], loaded: Container[str], listed: Callable[[], Sequence[str]]
) -> None:
    """Raise UnknownAdapterError unless all that `names` name is `loaded`; `listed` gives what may
    be named. Raises ConfigError for weights by name, where a name belongs."""
    lacking = [name for name in names if not isinstance(name, str) or name not in loaded]
    if not lacking:
        return
    for name in lacking:
        if isinstance(name, Mapping):
            raise ConfigError(
                f"{name!r} is no name of an adapter; weights by name are for calls, blocks and "
                "set_adapter()"
            )
    each = dict.fromkeys(own for name in lacking for own in members(name))
    unknown = [name for name in each if name not in loaded]
    if unknown:
        known = listed()
        said = "; ".join(f"{name!r}{nearest(str(name), known)}" for name in unknown)
        raise UnknownAdapterError(f"no adapter named {said}; loaded: {', '.join(known) or 'none'}")


def owning(names: Iterable[str], adapters: Mapping[str, StoredAdapter]) -> int:
    """How many of these have weights of their own. A sum has them that is one adapter at weight 1,
    whether it was made already or not."""
    wanted = (
        [own for own, weight in name.weights if weight] if isinstance(name, Mixture) else [name]
        for name in names
    )
    return sum(any(own in adapters and adapters[own].owned for own in each) for each in wanted)


def too_many(wanted: Sequence[str], slots: int) -> CapacityError:
    """More distinct adapters in a batch than slots."""
    return CapacityError(
        f"the batch has {len(wanted)} distinct adapters ({', '.join(wanted)}), but "
        f"there are only {slots} slots; split the batch, or compile "
        f'with LoraConfig(max_adapters={len(wanted)}) or Options(overflow="waves"), which serves '
        "requests in turn where each finds slots beside pinned adapters"
    )


def no_own_room(name: str) -> CapacityError:
    """`name` keeps its slot, which has no room for what it is to hold now."""
    return CapacityError(
        f"{name!r} is pinned, and there is no room for its own weights; unpin it, or compile with "
        "a larger LoraConfig(max_own_weights=...)"
    )


def room_for(
    wanted: Sequence[str],
    slots: Mapping[str, int],
    pinned: AbstractSet[str],
    held: AbstractSet[int],
    count: int,
) -> tuple[list[int], list[str]]:
    """The free ones of `count` slots, and the adapters that may lose theirs to those of `wanted`
    that have none. `slots` are those of adapters, least recently used first; `held` keep theirs.

    Raises:
        CapacityError: that is not enough.
    """
    missing = [name for name in wanted if name not in slots]
    free = [slot for slot in range(count) if slot not in set(slots.values())]
    # Versions that a pinned one replaced take turns with it.
    kept = pinned - set(map(loaded_as, wanted))
    evictable = [
        name
        for name, slot in slots.items()
        if name not in wanted and name not in kept and slot not in held
    ]
    if len(missing) > len(free) + len(evictable):
        raise _no_slots(missing, slots.keys() - set(evictable) - set(wanted), count)
    return free, evictable


def _no_slots(missing: Sequence[str], kept: Iterable[str], slots: int) -> CapacityError:
    """The slots are kept for others, `kept`."""
    return CapacityError(
        f"no slots for {', '.join(missing)}: {slots} slots, of which "
        f"{', '.join(sorted(kept))} are pinned, or used by the call around this one; "
        "unpin_adapter() some, split the batch, or "
        "compile with a larger LoraConfig(max_adapters=...)"
    )
