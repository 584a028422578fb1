"""What was there before a capture is no business of the garbage collector while it runs."""

from __future__ import annotations

import gc
import operator
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from tiny_models import FAMILIES
from torch import fx

import lorafx
from lorafx import collector
from lorafx.collector import earlier_objects_spared
from lorafx.graph.context import Context


@pytest.fixture(autouse=True)
def _nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture of all files freezes what others left."""
    gc.unfreeze()
    monkeypatch.setattr(collector, "_ask_again", 0.0)


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.quick
def test_garbage_is_found_among_what_a_block_makes() -> None:
    before = Ring()
    old = weakref.ref(before)
    with earlier_objects_spared():
        assert gc.get_freeze_count()
        made = weakref.ref(Ring())
        del before
        gc.collect()  # of few objects: the others are frozen
        assert made() is None
        assert old() is not None
        with earlier_objects_spared():
            pass
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    assert any(map(partial(operator.is_, old()), gc.get_objects(generation=2)))  # millions


@pytest.mark.quick
@pytest.mark.parametrize("generation", [0, 1, 2])
def test_what_outlasts_a_collection_is_not_looked_at_again(generation: int) -> None:
    callbacks = list(gc.callbacks)
    with earlier_objects_spared():
        lasting = Ring()
        gc.collect(generation)
        young = weakref.ref(Ring())
        kept = weakref.ref(lasting)
        del lasting
        gc.collect()
        assert young() is None
        assert kept() is not None
    assert any(map(partial(operator.is_, kept()), gc.get_objects(generation=2)))
    assert gc.callbacks == callbacks


@pytest.mark.quick
def test_an_error_puts_the_objects_back() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), earlier_objects_spared():
        raise KeyError
    assert not gc.get_freeze_count()
    assert gc.get_threshold() == before


@pytest.mark.quick
@pytest.mark.parametrize(("young", "inside"), [(700, 100_000), (200_000, 200_000), (0, 0)])
def test_garbage_is_looked_for_less_often_never_more(young: int, inside: int) -> None:
    own = gc.get_threshold()
    gc.set_threshold(young, 11, 12)
    try:
        with earlier_objects_spared(), earlier_objects_spared():
            assert gc.get_threshold() == (inside, 11, 12)
        assert gc.get_threshold() == (young, 11, 12)
    finally:
        gc.set_threshold(*own)


@pytest.mark.quick
def test_what_the_program_has_frozen_stays_frozen() -> None:
    own = Ring()
    gc.freeze()
    try:
        with earlier_objects_spared():
            assert all(item is not own for item in gc.get_objects())
        assert all(item is not own for item in gc.get_objects())
    finally:
        gc.unfreeze()


@pytest.mark.quick
def test_what_is_frozen_is_not_counted_at_each_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    count = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: counted.append(count()) or counted[-1])
    gc.freeze()
    try:
        for _ in range(3):
            with earlier_objects_spared():
                pass
        assert len(counted) == 1
        monkeypatch.setattr(collector, "_ask_again", collector._ask_again - 3600)
    finally:
        gc.unfreeze()
    with earlier_objects_spared():  # the program has let go of them
        assert count()
    assert not count()


@pytest.mark.quick
def test_a_capture_spares_the_model(plain: Case) -> None:
    seen: list[int] = []

    def look(gm: fx.GraphModule, ctx: Context) -> int:
        seen.append(gc.get_freeze_count())
        return 0

    torch.manual_seed(0)
    passes = {"look": lorafx.After("captured", look)}
    cm: Any = plain.compile({"lowering": "reference", "passes": passes})
    check_mixed(cm, plain, ["a1", None, "a3"], FAMILIES["plain"].inputs(3, 4))
    assert seen
    assert all(seen)
    assert not gc.get_freeze_count()
