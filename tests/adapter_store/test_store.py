"""The store: right slots, least recently used first out, banks that hold what they should."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from small_banks import SLOTS, held, make_adapter, make_groups, same

from lorafx.adapter_store.store import AdapterStore
from lorafx.errors import CapacityError, CheckpointError, UnknownAdapterError
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


def test_evicts_the_least_recently_used_that_is_neither_pinned_nor_in_the_batch(filled):
    store = filled.store
    store.acquire(["a", "b", "c"])
    store.acquire(["a"])
    store.acquire(["d", "b"])  # b is older than c, but in the batch
    assert list(store.resident) == ["a", "d", "b"]
    slot = store.pin("a")
    for name in "bcde":
        store.acquire([name])
    assert store.resident["a"] == slot
    store.unpin("a")
    store.acquire(["b", "c", "d"])
    assert "a" not in store.resident


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
