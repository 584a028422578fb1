"""What a batch asks for and the store does not have: adapters by these names, or as many slots."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from lorafx.adapter_store.holding import staying
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


def too_many(wanted: Mapping[str, int], slots: int) -> CapacityError:
    """More adapters in a batch than find slots; `wanted` says how many each takes."""
    if len(wanted) > slots:
        return CapacityError(
            f"the batch has {len(wanted)} distinct adapters ({', '.join(wanted)}), but "
            f"there are only {slots} slots; split the batch, or compile "
            f'with LoraConfig(max_adapters={len(wanted)}) or Options(overflow="waves"), which '
            "serves requests in turn where each finds slots beside pinned adapters"
        )
    needed = sum(wanted.values()) - max(wanted.values()) + 1
    said = ", ".join(f"{name} {width}" for name, width in wanted.items())
    return CapacityError(
        f"the adapters of the batch take {needed} slots by their ranks ({said}; one of them may "
        f"reach past the last slot), but there are only {slots}; split the batch, or compile with "
        f'LoraConfig(max_adapters={needed}), a larger slot_rank, or Options(overflow="waves")'
    )


def outgrown(stored: StoredAdapter) -> CapacityError:
    """A pinned adapter was replaced by one that has no room where it lies."""
    if stored.owned:
        return CapacityError(
            f"{stored.name!r} is pinned, and there is no room for its own weights; unpin "
            "it, or compile with a larger LoraConfig(max_own_weights=...)"
        )
    return CapacityError(
        f"{stored.name!r} is pinned, and would take {stored.width} slots in a row now, some of "
        "which are not free; unpin it first"
    )


def evictable_for(
    wanted: Sequence[str],
    slots: Mapping[str, int],
    pinned: AbstractSet[str],
    held: AbstractSet[int],
) -> tuple[list[str], set[str]]:
    """Of the adapters with `slots`, least recently used first: those that may lose theirs to those
    of `wanted` that have none, and those that have to stay where they are. Slots that are `held`
    are of the latter."""
    pinned = staying(pinned, wanted)
    kept = {name for name, slot in slots.items() if name in pinned or slot in held}
    return [name for name in slots if name not in wanted and name not in kept], kept


def no_slots(missing: Mapping[str, int], kept: AbstractSet[str], slots: int) -> CapacityError:
    """The slots are kept for others, `kept`; `missing` says how many slots each takes."""
    each = ", ".join(
        name if width == 1 else f"{name} ({width} slots in a row)"
        for name, width in missing.items()
    )
    return CapacityError(
        f"no slots for {each}: {slots} slots, of which "
        f"those of {', '.join(sorted(kept))} are pinned, or used by the call around this one; "
        "unpin_adapter() some, split the batch, or "
        "compile with a larger LoraConfig(max_adapters=...)"
    )
