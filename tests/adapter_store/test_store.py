"""The store: right slots, least recently used first out, banks that hold what they should.

Where slots share room, adapters of a larger rank take several in a row, and overwrite nobody.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from lorafx.adapter_store.store import AdapterStore
from lorafx.adapter_store.stored import Adapter, LoraWeights
from lorafx.errors import CapacityError, CheckpointError, UnknownAdapterError
from lorafx.model.bank import Bank
from lorafx.model.sites import Group, Site
from lorafx.registry import lookup

SLOTS = 3
SIZES = {"q": (5, 7), "k": (5, 2), "embed": (6, 3), "down": (8, 5)}


def make_groups(
    dtype=torch.float32, slots: int = SLOTS, rank: int = 4, slot_rank: int | None = None
) -> list[Group]:
    """q and k in one bank, an embedding and a lone linear in banks of their own."""
    cpu = torch.device("cpu")
    sites = {}
    for path, (k, n) in SIZES.items():
        module = nn.Embedding(k, n) if path == "embed" else nn.Linear(k, n)
        sites[path] = Site(path, (), module, lookup(module), k, n, dtype, cpu)
    groups = []
    for members in (("q", "k"), ("embed",), ("down",)):
        outs = tuple(SIZES[m][1] for m in members)
        bank = Bank.allocate(
            kind=sites[members[0]].eligible.kind,
            slots=slots,
            rank=rank,
            slot_rank=slot_rank,
            in_features=SIZES[members[0]][0],
            out_features=outs,
            dtype=dtype,
            device=cpu,
        )
        offsets = tuple(sum(outs[:i]) for i in range(len(outs)))
        groups.append(Group(tuple(sites[m] for m in members), offsets, bank))
    return groups


def make_adapter(name: str, ranks: dict[str, int], seed: int = 0) -> Adapter:
    made = torch.Generator().manual_seed(seed)
    weights = {
        path: LoraWeights(
            torch.randn(rank, SIZES[path][0], generator=made),
            torch.randn(SIZES[path][1], rank, generator=made),
            0.5 + seed,
        )
        for path, rank in ranks.items()
    }
    return Adapter(name, weights, max(ranks.values()), "memory")


def held(groups: list[Group], slot: int) -> dict[str, LoraWeights]:
    """What the banks say about `slot`, read only as far as `ranks` allows."""
    found = {}
    for group in groups:
        bank = group.bank
        for i, site in enumerate(group.sites):
            r = int(bank.ranks[slot, i])
            if r == 0:
                continue
            if site.eligible.kind == "embedding":
                a = bank.A[slot, :, :r].t()
            else:
                a = bank.A[slot, :r].unflatten(1, (bank.ranks.shape[1], -1))[:, i]
            columns = slice(group.offsets[i], group.offsets[i] + site.out_features)
            b = bank.B[slot, :r, columns].t()
            found[site.path] = LoraWeights(a, b, float(bank.scales[slot, i]))
    return found


def same(found: dict[str, LoraWeights], adapter: Adapter) -> bool:
    return found.keys() == adapter.weights.keys() and all(
        torch.equal(found[p].A, w.A) and torch.equal(found[p].B, w.B) and found[p].scale == w.scale
        for p, w in adapter.weights.items()
    )


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


def test_steps_and_loads_do_not_look_through_all_adapters(filled, monkeypatch):
    """Otherwise each takes milliseconds with a hundred thousand of them."""

    def refused(self):
        raise AssertionError("all adapters are looked through")

    for name in ("__iter__", "items", "values", "keys"):
        monkeypatch.setattr(type(filled.store._adapters), name, refused, raising=False)
    filled.store.acquire(["a", "b", None])
    filled.store.load(make_adapter("a", {"q": 1}, 7))
    hold = filled.store.hold("c")
    filled.store.load(make_adapter("c", {"q": 1}, 8))
    filled.store.acquire([hold.name, "a"])
    filled.store.unload("b")


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


ROOM, SLOT_RANK, RANK = 6, 2, 7


def store_of(slots: int = ROOM) -> tuple[list, AdapterStore]:
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
    store.pin("b")

    def others() -> None:
        load(store, x=7, y=2, z=2)
        store.acquire(["x", "y", "z"])
        assert store.names == ("x", "y", "z")

    store.run_emptied(others)
    assert store.resident == before
    assert store.pinned == {"b"}
    for name, slot in before.items():
        assert same(held(groups, slot), made[name])


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
TestStoreOfWindows.settings = settings(max_examples=30, stateful_step_count=30)
