"""Slots that share room: adapters of a larger rank take several in a row, and overwrite nobody."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_banks import SIZES, held, make_adapter, make_groups, same

from lorafx.adapter_store.store import AdapterStore
from lorafx.adapter_store.stored import Adapter
from lorafx.errors import CapacityError

pytestmark = [pytest.mark.usefixtures("fixed_sizes"), pytest.mark.quick]

SLOTS, SLOT_RANK, RANK = 6, 2, 7


def store_of(slots: int = SLOTS) -> tuple[list, AdapterStore]:
    groups = make_groups(slots=slots, rank=RANK, slot_rank=SLOT_RANK)
    return groups, AdapterStore(groups, slots)


def load(store: AdapterStore, **ranks: int) -> dict[str, Adapter]:
    made = {
        n: make_adapter(n, dict.fromkeys(SIZES, r), i) for i, (n, r) in enumerate(ranks.items())
    }
    for adapter in made.values():
        store.load(adapter)
    return made


def test_what_stood_in_a_window_is_back_afterwards():
    groups, store = store_of(slots=4)
    made = load(store, a=2, b=2, c=4)
    before = dict(zip("abc", store.acquire(["a", "b", "c"]), strict=True))

    def others() -> None:
        load(store, x=7, y=2, z=2)
        store.acquire(["x", "y", "z"])

    store.set_aside(others)
    assert store.resident == before
    for name, slot in before.items():
        assert same(held(groups, slot), made[name])
    free = set(range(4)) - {s for n, s in before.items()}
    assert all(not held(groups, slot) for slot in free)


class StoreOfWindows(RuleBasedStateMachine):
    """Random calls: what is in a slot is what was loaded, and what may not move does not."""

    names = st.sampled_from("abcdefg")

    @initialize()
    def start(self):
        self.groups, self.store = store_of()
        self.loaded: dict[str, Adapter] = {}
        self.pinned: dict[str, int] = {}
        self.seed = 0

    @rule(
        name=names,
        ranks=st.dictionaries(st.sampled_from([*SIZES]), st.integers(1, RANK), min_size=1),
    )
    def load(self, name, ranks):
        self.seed += 1
        made = make_adapter(name, ranks, self.seed)
        try:
            self.store.load(made)
        except CapacityError:
            assert name in self.pinned
        else:
            self.loaded[name] = made

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def unload(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        self.store.unload(name)
        del self.loaded[name]
        self.pinned.pop(name, None)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def pin(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        if self.store.fits(frozenset({name})):
            self.pinned[name] = self.store.pin(name)

    @rule(name=names)
    def unpin(self, name):
        if name in self.loaded:
            self.store.unpin(name)
            self.pinned.pop(name, None)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def acquire(self, data):
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.loaded)), max_size=5))
        before = self.store.resident
        if self.store.fits(frozenset(wanted)):
            slots = self.store.acquire(wanted)
            assert slots == [self.store.resident[name] for name in wanted]
            assert self.store.resident.keys() >= self.pinned.keys()
            return
        with pytest.raises(CapacityError):
            self.store.acquire(wanted)
        assert self.store.resident == before

    @invariant()
    def banks_hold_the_adapters(self):
        resident = self.store.resident
        for name, slot in resident.items():
            assert same(held(self.groups, slot), self.loaded[name])
        assert all(resident[name] == slot for name, slot in self.pinned.items())
        assert self.store.pinned == self.pinned.keys()


TestStoreOfWindows = StoreOfWindows.TestCase
TestStoreOfWindows.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
