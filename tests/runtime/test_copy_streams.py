"""Copies into slots run beside steps, and never into a slot that a step may read. The streams here
note who comes after whom; tests/gpu/test_gpu_copies.py has a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, random_base
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from own_weights import own_case

import lorafx
from lorafx.adapter_store.copy_streams import CopyStreams
from lorafx.errors import BatchError, CapacityError
from lorafx.model.bank import Bank
from lorafx.runtime.entry import Entry
from lorafx.runtime.running import Streams


@dataclass
class Launch:
    """What runs on `device`; `after` are the launches that it waits for."""

    number: int
    device: torch.device
    stream: Stream
    writes: bool
    slots: frozenset[Any]
    after: frozenset[int]


class Event:
    def __init__(self, cuda: Cuda, after: frozenset[int]) -> None:
        self.cuda, self.after = cuda, after

    def query(self) -> bool:
        """What the host has seen to be done comes before all that it launches later."""
        if not self.after <= self.cuda.done and self.cuda.finished():
            self.cuda.done |= self.after
        return self.after <= self.cuda.done


class Stream:
    made: Cuda

    def __init__(self, device: torch.device) -> None:
        self.device, self.after = device, frozenset[int]()

    def record_event(self) -> Event:
        return Event(self.made, self.after)

    def wait_event(self, event: Event) -> None:
        self.after |= event.after

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after


@dataclass
class Memory:
    """A tensor of a bank, as far as its memory goes."""

    device: torch.device

    def record_stream(self, stream: Stream) -> None:
        assert stream.device == self.device


@dataclass(eq=False)
class Cuda:
    """Devices with a current stream each, on which the banks of a compiled model are in turn.

    Attributes:
        finished: whether what the host asks about is done by now.
        capturing: whether a CUDA graph is being captured.
    """

    devices: tuple[torch.device, ...] = (torch.device("cuda", 0), torch.device("cuda", 1))
    finished: Callable[[], bool] = lambda: False
    capturing: bool = False
    launches: list[Launch] = field(default_factory=list)
    done: frozenset[int] = frozenset()
    current: dict[torch.device, Stream] = field(default_factory=dict)
    streams: dict[tuple[torch.device, int], Stream] = field(default_factory=dict)

    def on(self, number: int) -> None:
        """Have the stream of this number be the current one of each device."""
        for device in self.devices:
            key = device, number
            self.current[device] = self.streams.setdefault(key, self.stream_class(device))

    def launch(self, device: torch.device, slots: Any, *, writes: bool) -> None:
        if self.capturing:
            return
        stream = self.current[device]
        after = stream.after | self.done
        made = Launch(len(self.launches), device, stream, writes, frozenset(slots), after)
        self.launches.append(made)
        stream.after = after | {made.number}

    def clashes(self) -> list[tuple[Launch, Launch]]:
        """Launches of which one writes a slot that the other touches, in no order of their own."""
        return [
            (first, second)
            for second in self.launches
            for first in self.launches[: second.number]
            if first.device == second.device
            and first.slots & second.slots
            and (first.writes or second.writes)
            and first.number not in second.after
        ]

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before = self.current[stream.device]
        self.current[stream.device] = stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    def serve(self, cm: Any, patch: pytest.MonkeyPatch) -> None:
        """Have the compiled model copy adapters on these devices, until the patch is undone."""
        session = self.session = cm._session
        self.stream_class = type("Stream", (Stream,), {"made": self})
        self.on(0)
        groups = session.program.groups
        self.banks = {
            id(group.bank): self.devices[n % len(self.devices)] for n, group in enumerate(groups)
        }
        patch.setattr(torch.cuda, "Stream", self.stream_class)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self.entered)
        for owner in (torch.cuda, torch.accelerator):  # a function each: Dynamo lists them
            patch.setattr(owner, "current_stream", lambda device: self.current[device])
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        for name in ("write", "write_by_column"):
            patch.setattr(Bank, name, self._noting(getattr(Bank, name)))
        run_graph = Entry.run_graph

        def reading(entry: Entry, call: Any, conversion: Any = None) -> Any:
            self.step(entry.session.program.runtime.rows)
            return run_graph(entry, call, conversion)

        patch.setattr(Entry, "run_graph", reading)
        memory: Any = [Memory(device) for device in self.devices]
        patch.setattr(session.store, "copy_streams", CopyStreams(memory))
        patch.setattr(session.locks, "streams", Streams())
        patch.setattr(session, "accelerators", self.devices)

    def step(self, rows: tuple[int, ...]) -> None:
        """What reads these slots, those that their adapters take beside them, and the places of
        weights of their own."""
        store, touched = self.session.store, {*filter(lambda row: row >= 0, rows)}
        for name, slot in store.resident.items():
            if slot in rows:
                touched.update(store._window(name, slot))
                if store[name].owned:
                    touched.add(f"own {store._own_places[slot]}")
        for device in self.devices:
            self.launch(device, touched, writes=False)

    def _noting(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def noting(bank: Bank, slot: int, *more: Any) -> Any:
            factors, own, place = (*more, (), None, 0)[:3] if len(more) != 1 else (more[0], None, 0)
            width = max((bank.width(f.rank) for f in factors), default=1)
            touched: list[Any] = [*range(slot, slot + width)]
            if own is not None:
                touched.append(f"own {place}")
            if id(bank) in self.banks:
                self.launch(self.banks[id(bank)], touched, writes=True)
            return write(bank, slot, *more)

        return noting


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


def numbers(launches: Sequence[Launch]) -> set[int]:
    return {launch.number for launch in launches}


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


@settings(max_examples=8, phases=[Phase.generate])
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
