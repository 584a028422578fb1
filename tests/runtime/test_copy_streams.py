"""Copies into slots run beside steps, and never into a slot that a step may read. The streams here
note who comes after whom; tests/gpu/test_gpu_copies.py has a GPU's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, random_base
from fake_streams import Cuda, Launch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from own_weights import own_case

import lorafx
from lorafx.errors import BatchError, CapacityError

#: Of several ranks, with norms of the base, and with weights of their own.
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "target_modules": ["up", "down"]},
    "b": {"r": 6, "target_modules": ["up", "gate"]},
    "c": {"r": 8, "target_modules": ["down"]},
    "d": {"r": 4, "target_modules": ["up"], "use_dora": True},
    "e": {"target_modules": ["up"], "modules_to_save": ["head"]},
    "f": {"target_modules": ["gate"], "modules_to_save": ["head"]},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return own_case(random_base("plain"), tmp_path_factory.mktemp("adapters"), ADAPTERS)


@pytest.fixture(scope="module")
def cm(case: Case) -> Any:
    config = lorafx.LoraConfig(max_adapters=3, max_rank=8)
    compiled = lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE)
    step(compiled, "a", None)
    step(compiled, None, None)
    return compiled


@pytest.fixture
def cuda(cm: Any, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    empty(cm)
    made = Cuda()
    made.serve(cm, monkeypatch)
    return made


def step(cm: Any, *names: Any) -> None:
    cm(ids=torch.tensor([[3, 4, 5]] * len(names)), adapter_names=list(names))


def launched(cuda: Cuda, action: Callable[[], object]) -> list[Launch]:
    before = len(cuda.launches)
    action()
    return cuda.launches[before:]


def numbers(launches: Sequence[Launch]) -> set[int]:
    return {launch.number for launch in launches}


def waits(launches: Sequence[Launch], others: Sequence[Launch]) -> bool:
    """Whether all of the former wait for all of the latter on their device."""
    return all(
        launch.after >= {other.number for other in others if other.device == launch.device}
        for launch in launches
    )


def free(launches: Sequence[Launch], others: Sequence[Launch]) -> bool:
    return all(launch.after.isdisjoint(numbers(others)) for launch in launches)


def empty(cm: Any) -> None:
    """No adapter has a slot."""
    store = cm._session.store
    for name in store.pinned:
        cm.unpin_adapter(name)
    store._slots.clear()


NAMES = st.sampled_from([*ADAPTERS, None])
PAIRS = st.tuples(NAMES, NAMES)
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["step", "prefetch"]), PAIRS),
    st.tuples(
        st.sampled_from(["replace", "replace", "unload", "pin"]), st.sampled_from([*ADAPTERS])
    ),
    st.tuples(
        st.sampled_from(["capture", "again", "again", "replay", "measure", "measure"]), PAIRS
    ),
)


def run(cm: Any, case: Case, cuda: Cuda, operations: Sequence[Any]) -> None:
    """Do this, on streams in turn; where no slot is left, nothing of it."""
    last: tuple[str | None, ...] = (None, None)
    for stream, (what, of) in operations:
        captured = cm._session.store.copy_streams.captured
        cuda.on(0 if captured else stream)
        try:
            if what in ("step", "again"):
                last = of if what == "step" else last
                step(cm, *last)
            elif what == "prefetch":
                cm.prefetch_adapters(of)
            elif what == "capture":
                cuda.on(0)
                step(cm, *of)
                cuda.capturing = True
                step(cm, *of)
            elif what == "replay" and captured:
                cuda.step(cm._session.program.runtime.rows)
            elif what == "measure":
                cm._session.update(cm._session.store.refresh_magnitudes)
            elif what == "pin":
                (cm.unpin_adapter if of in cm._session.store.pinned else cm.pin_adapter)(of)
            elif what in ("replace", "unload"):
                if what == "unload":
                    cm.unload_adapter(of)
                cm.load_adapter(case.folders[of], of)
        except CapacityError:
            pass
        finally:
            cuda.capturing = False


@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(
    st.lists(st.tuples(st.integers(0, 2), OPERATIONS), min_size=10, max_size=25),
    st.integers(0, 9999),
)
def test_no_order_of_a_device_lets_a_copy_meet_a_step(
    cm: Any, case: Case, operations: Any, seed: int
) -> None:
    random = Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        cuda = Cuda(finished=lambda: random.random() < 0.5)
        cuda.serve(cm, patch)
        empty(cm)
        run(cm, case, cuda, operations)
    assert not cuda.clashes()


def test_a_prefetch_runs_beside_a_step_and_its_own_step_waits(cm, cuda: Cuda) -> None:
    running = launched(cuda, lambda: step(cm, "a", None))[-2:]
    copies = launched(cuda, lambda: cm.prefetch_adapters(["b", "c"]))
    assert {launch.writes for launch in copies} == {True}
    assert free(copies, running)
    assert cm._session.store.resident.keys() == {"a", "b", "c"}
    others = launched(cuda, lambda: step(cm, "a", "a"))
    assert free(others, copies)
    loads = cm.stats().loads
    both = launched(cuda, lambda: step(cm, "b", "c"))
    assert waits(both, copies)
    assert cm.stats().loads == loads


def test_a_slot_is_overwritten_when_the_steps_that_read_it_have_ended(cm, cuda: Cuda) -> None:
    """The steps after these are not waited for."""
    first = launched(cuda, lambda: step(cm, "a", "b"))[-2:]
    later = launched(cuda, lambda: step(cm, "c", None))[-2:]
    cuda.on(1)
    copies = launched(cuda, lambda: cm.prefetch_adapters(["d"]))
    assert "a" not in cm._session.store.resident
    assert waits(copies, first)
    assert free(copies, later)


def test_prefetched_adapters_are_served(cm, case: Case, cuda: Cuda) -> None:
    inputs = {"ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    graphs = cm.recompiles
    for names in (["a", "b"], ["c", None], ["a", "b"], ["c", "a"]):
        cm.prefetch_adapters(names)
        check_mixed(cm, case, names, inputs)
    cm.prefetch_adapters([{"a": 0.5, "b": 0.5}, "__base__"])
    loads = cm.stats().loads
    step(cm, {"b": 0.5, "a": 0.5}, None)
    assert (cm.stats().loads, cm.recompiles) == (loads, graphs)


def test_what_is_copied_lives_until_it_has_arrived(case: Case, cuda: Cuda, cm) -> None:
    """A new version would let go of it at once."""
    cuda.finished = lambda: False
    cm.prefetch_adapters(["a"])
    store = cm._session.store
    known = weakref.ref(store["a"])
    cm.load_adapter(case.folders["a"], "a")
    cm.unload_adapter("a")
    step(cm, "b", None)
    assert known() is not None
    cuda.finished = lambda: True
    step(cm, "b", "b")
    assert known() is None
    cm.load_adapter(case.folders["a"], "a")


def test_a_capture_waits_for_no_copy(cm, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cm.prefetch_adapters(["a", "b"])
    cuda.capturing = True
    with pytest.raises(BatchError, match=r"'a' may still be on the way.*once before the capture"):
        step(cm, "a", None)
    cuda.capturing = False
    step(cm, "a", None)
    cuda.capturing = True
    step(cm, "a", None)
    cuda.capturing = False


def test_nothing_is_written_while_a_call_is_captured(cm, case: Case, cuda: Cuda) -> None:
    """Each replay would write it again."""
    step(cm, "a", None)
    before = cm._session.store.resident
    cuda.capturing = True
    with pytest.raises(BatchError, match="'b' would be written into the banks"):
        step(cm, "b", None)
    with pytest.raises(BatchError, match="'a' would be written into the banks"):
        cm.load_adapter(case.folders["a"], "a")
    cuda.capturing = False
    step(cm, "a", None)
    assert cm._session.store.resident == before


def test_calls_inside_a_call_keep_the_slots_around_them(cm, cuda: Cuda) -> None:
    """The outer forward goes on to read its slots when the inner one has returned."""
    session, store = cm._session, cm._session.store

    def outer() -> None:
        store.acquire(["a"])
        inner = session.running.in_forward(())
        session.run(inner, lambda: store.acquire(["b"]))
        session.run(inner, lambda: cuda.step((store.resident["a"],)))

    session.run(session.running.in_forward(()), outer)
    del store._slots["a"]
    step(cm, "c", "d")
    step(cm, "a", None)
    assert not cuda.clashes()
