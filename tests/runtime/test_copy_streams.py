"""Copies into slots run beside steps, and never into a slot that a step may read. The streams here
note who comes after whom; tests/gpu/test_gpu_copies.py has a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, random_base
from fake_streams import Cuda, Launch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from own_weights import own_case

import lorafx
from lorafx.errors import BatchError, CapacityError

#: Of several widths, with norms of the base, and with weights of their own.
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
    config = lorafx.LoraConfig(max_adapters=4, max_rank=8, slot_rank=4, max_own_weights=1)
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
    st.tuples(st.just("step"), PAIRS),
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
