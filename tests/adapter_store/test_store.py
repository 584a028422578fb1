"""The store: right slots, least recently used first out, banks that hold what they should."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_banks import RANK, SIZES, SLOTS, held, make_adapter, make_groups, same

from lorafx.adapter_store.adapter import Adapter
from lorafx.adapter_store.store import AdapterStore
from lorafx.errors import CapacityError, CheckpointError, ConfigError, UnknownAdapterError
from lorafx.model.bank import Bank

pytestmark = pytest.mark.quick


@pytest.fixture
def filled():
    """A store with adapters a to e of unequal sites and ranks, none of them in a slot."""
    groups = make_groups()
    store = AdapterStore(groups, SLOTS)
    ranks = [{"q": 2, "embed": 3}, {"k": 4}, {"q": 1, "k": 3}, {"down": 2}, {"embed": 1, "k": 1}]
    adapters = {
        n: make_adapter(n, r, i) for i, (n, r) in enumerate(zip("abcde", ranks, strict=False))
    }
    for adapter in adapters.values():
        store.load(adapter)
    return SimpleNamespace(store=store, groups=groups, adapters=adapters)


def snapshot(filled) -> tuple:
    store = filled.store
    tensors = [
        t.clone() for g in filled.groups for t in (g.bank.A, g.bank.B, g.bank.ranks, g.bank.scales)
    ]
    return list(store.resident.items()), store.names, store.pinned, tensors


def unchanged(before: tuple, filled) -> bool:
    after = snapshot(filled)
    return before[:3] == after[:3] and all(map(torch.equal, before[3], after[3]))


def test_rows_to_slots(filled):
    slots = filled.store.acquire(["b", None, "a", "__base__", "b"])
    assert slots[1] == slots[3] == -1
    assert slots[0] == slots[4] != slots[2]
    assert same(held(filled.groups, slots[0]), filled.adapters["b"])
    assert same(held(filled.groups, slots[2]), filled.adapters["a"])


def test_base_rows_take_no_slot(filled):
    assert filled.store.acquire([None, "__base__"]) == [-1, -1]
    assert filled.store.resident == {}


def test_evicts_the_least_recently_used_that_is_not_in_the_batch(filled):
    store = filled.store
    store.acquire(["a", "b", "c"])
    store.acquire(["a"])
    store.acquire(["d", "b"])  # b is older than c, but in the batch
    assert set(store.resident) == {"a", "b", "d"}
    assert list(store.resident) == ["a", "d", "b"]


def test_slots_keep_their_addresses(filled):
    before = [g.bank.A.data_ptr() for g in filled.groups]
    for name in "abcdeabcde":
        (slot,) = filled.store.acquire([name])
        assert same(held(filled.groups, slot), filled.adapters[name])
    assert [g.bank.A.data_ptr() for g in filled.groups] == before


def test_pinned_adapters_stay(filled):
    store = filled.store
    slot = store.pin("a")
    for name in "bcde":
        store.acquire([name])
    assert store.resident["a"] == slot
    store.unpin("a")
    store.acquire(["b", "c", "d"])
    assert "a" not in store.resident


def test_replacing_rewrites_the_slot_in_place(filled):
    (slot,) = filled.store.acquire(["a"])
    fresh = make_adapter("a", {"down": 3, "q": 1}, seed=9)
    filled.store.load(fresh)
    assert filled.store.resident == {"a": slot}
    assert same(held(filled.groups, slot), fresh)
    assert filled.store["a"].sites == ("down", "q")


def test_unload_frees_the_slot_and_its_rows(filled):
    slot = filled.store.pin("a")
    filled.store.unload("a")
    assert "a" not in filled.store
    assert filled.store.pinned == frozenset()
    assert held(filled.groups, slot) == {}
    with pytest.raises(UnknownAdapterError, match="no adapter named 'a'"):
        filled.store.acquire(["a"])


def test_converts_to_the_banks_dtype():
    groups = make_groups(torch.bfloat16)
    store = AdapterStore(groups, SLOTS)
    adapter = make_adapter("a", {"q": 2})
    store.load(adapter)
    store.acquire(["a"])
    assert torch.equal(held(groups, 0)["q"].A, adapter.weights["q"].A.bfloat16())
    assert store.nbytes()["host"] == 2 * (2 * 5 + 7 * 2)
    assert store.nbytes()["banks"] == sum(g.bank.nbytes for g in groups)


def test_keeps_its_own_copy(filled):
    adapter = make_adapter("x", {"q": 2})
    kept = adapter.weights["q"].A.clone()
    filled.store.load(adapter)
    adapter.weights["q"].A.zero_()
    (slot,) = filled.store.acquire(["x"])
    assert torch.equal(held(filled.groups, slot)["q"].A, kept)


def test_works_across_inference_mode(filled):
    with torch.inference_mode():
        groups = make_groups()
        store = AdapterStore(groups, SLOTS)
        store.load(filled.adapters["a"])
    (slot,) = store.acquire(["a"])
    assert same(held(groups, slot), filled.adapters["a"])


def test_unknown_names(filled):
    filled.store.load(make_adapter("french", {"q": 1}))
    filled.store.acquire(["a"])
    before = snapshot(filled)
    with pytest.raises(UnknownAdapterError, match=r"'frensh'; nearest: french.*loaded: a, b"):
        filled.store.acquire(["b", "frensh"])
    for call in (filled.store.pin, filled.store.unpin, filled.store.unload):
        with pytest.raises(UnknownAdapterError, match="'zz'"):
            call("zz")
    assert unchanged(before, filled)


def test_more_adapters_than_slots(filled):
    filled.store.acquire(["e"])
    before = snapshot(filled)
    with pytest.raises(CapacityError, match=r"4 distinct adapters .*3 slots.*max_adapters=4"):
        filled.store.acquire(["a", "b", "c", "d", None])
    assert unchanged(before, filled)


def test_pinned_adapters_leave_too_few_slots(filled):
    filled.store.pin("a")
    filled.store.pin("b")
    before = snapshot(filled)
    with pytest.raises(CapacityError, match="3 slots, of which those of a, b are pinned"):
        filled.store.acquire(["c", "d"])
    assert unchanged(before, filled)
    filled.store.acquire(["a", "b", "c"])


def _misfits() -> dict[str, tuple[Adapter, type[Exception], str]]:
    return {
        "name": (make_adapter("__base__", {"q": 1}), ConfigError, "non-empty string"),
        "no name": (make_adapter("", {"q": 1}), ConfigError, "non-empty string"),
    }


@pytest.mark.parametrize("case", _misfits())
def test_load_refuses_and_changes_nothing(case, filled):
    adapter, error, message = _misfits()[case]
    filled.store.acquire(["a"])
    before = snapshot(filled)
    with pytest.raises(error, match=message):
        filled.store.load(adapter)
    assert unchanged(before, filled)
    assert filled.store["a"].source == "memory"


def test_values_beyond_the_banks_dtype():
    store = AdapterStore(make_groups(torch.float16), SLOTS)
    adapter = make_adapter("a", {"q": 2})
    adapter.weights["q"].B.fill_(1e6)
    with pytest.raises(CheckpointError, match=r"q: values beyond the range of torch\.float16"):
        store.load(adapter)


def test_a_device_that_fails_midway_is_not_believed(filled, monkeypatch):
    """The evicted adapter lost its slot, the new one has none, and the next call writes both."""
    store = filled.store
    store.acquire(["a", "b", "c"])
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "write", lambda *_: (_ for _ in ()).throw(RuntimeError("device")))
        with pytest.raises(RuntimeError, match="device"):
            store.acquire(["d"])
    assert list(store.resident) == ["b", "c"]
    slots = store.acquire(["a", "b", "c"])
    assert len(set(slots)) == 3
    for name, slot in zip("abc", slots, strict=True):
        assert same(held(filled.groups, slot), filled.adapters[name])


def test_many_threads(filled):
    def work(names: str) -> list[int]:
        return [slot for name in names * 50 for slot in filled.store.acquire([name, None])]

    with ThreadPoolExecutor(4) as pool:
        slots = list(pool.map(work, ["abcd", "edcb", "adbe", "cabd"]))
    assert {s for row in slots for s in row} == {-1, 0, 1, 2}
    resident = filled.store.resident
    assert len(set(resident.values())) == len(resident) == SLOTS
    for name, slot in resident.items():
        assert same(held(filled.groups, slot), filled.adapters[name])


class StoreAgainstModel(RuleBasedStateMachine):
    """Random calls beside a dict-and-list model of what must come of them."""

    names = st.sampled_from("abcdefg")
    ranks = st.dictionaries(st.sampled_from(list(SIZES)), st.integers(1, RANK), min_size=1)

    @initialize()
    def start(self):
        self.groups = make_groups()
        self.store = AdapterStore(self.groups, SLOTS)
        self.loaded: dict[str, Adapter] = {}
        self.recent: list[str] = []  # resident, least recently used first
        self.pinned: set[str] = set()
        self.seed = 0

    @rule(name=names, ranks=ranks)
    def load(self, name, ranks):
        self.seed += 1
        self.loaded[name] = make_adapter(name, ranks, self.seed)
        self.store.load(self.loaded[name])

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def unload(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        self.store.unload(name)
        del self.loaded[name]
        self.pinned.discard(name)
        self.recent = [n for n in self.recent if n != name]

    @rule(name=names)
    def pin(self, name):
        if self.expect([name], lambda: self.store.pin(name)):
            self.pinned.add(name)

    @rule(name=names)
    def unpin(self, name):
        if name in self.loaded:
            self.store.unpin(name)
            self.pinned.discard(name)

    @rule(rows=st.lists(st.one_of(names, st.none(), st.just("__base__")), max_size=6))
    def acquire(self, rows):
        slots = self.expect(rows, lambda: self.store.acquire(rows))
        if slots is not None:
            resident = self.store.resident
            assert slots == [resident.get(n, -1) for n in rows]

    def expect(self, rows, call):
        """Result of `call`, which must serve `rows`, or None where the model says it cannot."""
        wanted = list(dict.fromkeys(n for n in rows if n not in (None, "__base__")))
        if any(n not in self.loaded for n in wanted):
            with pytest.raises(UnknownAdapterError):
                call()
            return None
        if len(self.pinned | set(wanted)) > SLOTS:
            with pytest.raises(CapacityError):
                call()
            return None
        result = call()
        room = [n for n in self.recent if n not in wanted and n not in self.pinned]
        for name in wanted:
            if name not in self.recent and len(self.recent) == SLOTS:
                self.recent.remove(room.pop(0))
            self.recent = [n for n in self.recent if n != name] + [name]
        return result if isinstance(result, list) else [result]

    @invariant()
    def resident_as_modelled(self):
        resident = self.store.resident
        assert list(resident) == self.recent
        assert len(set(resident.values())) == len(resident)
        assert self.store.pinned == self.pinned
        assert set(self.store.names) == set(self.loaded)

    @invariant()
    def banks_hold_the_adapters(self):
        for name, slot in self.store.resident.items():
            assert same(held(self.groups, slot), self.loaded[name])


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
