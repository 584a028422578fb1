"""Python collects no garbage inside of an eager forward, rarely all of it inside of a generate, and
as before when they have ended."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error
from interrupting import every_place
from torch import Tensor, nn

from lorafx.runtime import collection
from lorafx.runtime.collection import collection_of_new, collection_of_young, collection_paused

K = 6


class Littering(nn.Module):
    """Makes more garbage than Python leaves uncollected, and notes what is collected meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor, fails: bool = False) -> dict[str, Tensor]:
        collected = 0

        def note(phase: str, info: dict[str, int]) -> None:
            nonlocal collected
            collected += phase == "stop"

        gc.callbacks.append(note)
        for _ in range(2 * gc.get_threshold()[0]):
            ring: list[object] = []
            ring.append(ring)
        gc.callbacks.remove(note)
        if fails:
            raise ValueError("as its caller asked")
        return {"logits": self.w(x), "collected": torch.full((len(x),), collected)}


@pytest.fixture(params=[True, False], ids=["collecting", "not collecting"])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the caller lets Python collect, whatever an interrupted test has left."""
    gc.enable() if request.param else gc.disable()
    yield request.param
    gc.enable()


def test_an_eager_forward_is_not_interrupted(small: Callable[..., Case], collecting: bool) -> None:
    case = small(Littering, ["w"])
    cm: Any = case.compile({**REFERENCE, "start": "eager", "cache": None})
    x, names = torch.randn(3, K), ["a", None, "b"]
    assert bool(case.base(x)["collected"].sum()) == collecting  # without lorafx
    for _ in range(2):
        got = cm(x, adapter_names=names)
        assert error(got["logits"], case.expected(names, {"x": x})) <= TOLERANCE
        assert not got["collected"].sum()
        assert gc.isenabled() == collecting
    with pytest.raises(ValueError, match="as its caller asked"):
        cm(x, fails=True, adapter_names=names)
    assert gc.isenabled() == collecting


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """As in a user's process: tests freeze what earlier ones left."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_a_generate_rarely_walks_over_all_objects(llama: Case) -> None:
    cm: Any = llama.compile({**REFERENCE, "start": "eager", "cache": None})
    before, seen = gc.get_threshold(), []
    hook = cm._orig_mod.lm_head.register_forward_pre_hook(
        lambda *_: seen.append(gc.get_threshold())
    )
    ids = torch.ones(2, 3, dtype=torch.long)
    cm.generate(ids, max_new_tokens=2, do_sample=False, adapter_names=["a1", None])
    hook.remove()
    assert len(seen) == 2
    assert all(now[:2] == before[:2] and now[2] > before[2] for now in seen)
    assert gc.get_threshold() == before


class Ring:
    """Garbage that counting references does not free, such as an error that was caught."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.usefixtures("nothing_frozen")
def test_what_dies_between_generates_is_collected_as_without_them() -> None:
    young, old = weakref.ref(Ring()), gc.get_count()[2]
    with collection_of_young():
        pass
    assert gc.get_count()[2] >= old
    gc.collect(0)
    assert young() is None


def test_blocks_on_two_threads_leave_the_threshold_as_it_was() -> None:
    before, first, second = gc.get_threshold(), collection_of_young(), collection_of_young()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


BY_AND_BY = """
import gc, runpy, sys, weakref

block, ring = runpy.run_path(sys.argv[1])["collection_of_new"], type("Ring", (), {})()
ring.own, old = ring, weakref.ref(ring)
with block():
    del ring
for _ in range(10):
    with block():
        pass
assert old() is None
assert not gc.get_freeze_count()
"""


def test_what_dies_between_engines_is_collected_by_and_by() -> None:
    """In a process of its own: each block walks over ten million objects of earlier tests here."""
    subprocess.run([sys.executable, "-c", BY_AND_BY, collection.__file__], check=True)


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize(
    "block",
    [
        collection_paused,
        collection_of_young,
        pytest.param(collection_of_new, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_leaves_collection_on(block: Callable[[], Any]) -> None:
    before = gc.get_threshold()

    def entered() -> None:
        with block():
            assert not gc.isenabled() or gc.get_freeze_count() or gc.get_threshold() != before

    places = 0
    for place, _ in every_place(entered):
        assert gc.isenabled(), place
        assert not gc.get_freeze_count(), place
        assert gc.get_threshold() == before, place
        places += 1
    assert places > 2
