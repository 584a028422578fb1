"""A forked child serves what its parent does, whatever other threads of the parent were doing."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attached import attached, compiled, fresh_dynamo
from attached import served as serve
from dense_merge import Case, error
from pausing import MIXED, check, meanwhile, pausing, rows, served
from slowly import few
from torch import Tensor
from waiting import LONG

import lorafx
from lorafx.errors import CaptureError
from lorafx.model.bank import Bank
from lorafx.weights import merge

__all__ = ["fresh_dynamo", "meanwhile", "pausing"]


@pytest.fixture(scope="module")
def lm(llama: Case) -> Any:
    """A language model for prompts of any length."""
    return llama.compile()


def _in_child(action: Callable[[], None], seconds: int = LONG) -> int:
    """The status of a forked child that runs `action`: 0 where all was well."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(seconds)  # a child that waits for ever is killed
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "what",
    few(
        [
            "call",
            "slot",
            "weights",
            "merge",
            *(pytest.param(w, marks=pytest.mark.slow) for w in ("generate", "warm-up")),
        ],
        "call",
        "merge",
    ),
)
def test_fork_while_another_thread_is_busy(pausing, meanwhile, monkeypatch, llama, lm, what):
    """Its locks are held by nobody in the child, and what it was doing is not half done there."""
    torch.set_num_threads(1)  # the threads of an OpenMP pool do not exist in a child
    case, x = pausing, rows()
    cm = served(case)
    check(cm, case, MIXED, x)
    own = {name: value.clone() for name, value in cm._orig_mod.state_dict().items()}
    there, go = threading.Event(), threading.Event()

    def stop() -> None:
        if threading.current_thread() is busy:
            there.set()
            assert go.wait(LONG)

    reads = itertools.count(1)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        """The second reading is the one that is written."""
        second = next(reads) == 2
        for name, value in own.items():
            yield name, torch.ones_like(value)
            if second:
                stop()

    def generate() -> None:
        class Streamer:
            def put(self, tokens: Tensor) -> None:
                stop()

            def end(self) -> None: ...

        tokens = torch.ones(1, 3, dtype=torch.long)
        lm.generate(tokens, max_new_tokens=3, streamer=Streamer(), adapter_names=["a0"])

    write = Bank.write

    def writing(bank: Bank, slot: int, *what: Any) -> list[Tensor]:
        return (write(bank, slot, *what), stop())[0]

    actions: dict[str, Callable[[], Any]] = {
        "call": lambda: cm(x=x, adapter_names=["b", "b", "b"]),
        "generate": generate,
        "slot": lambda: cm.load_adapter(case.folders["c"], "a"),
        "weights": lambda: cm.load_weights(pairs),
        "merge": lambda: cm.merge("a"),
        "warm-up": lambda: cm.warmup({"x": x}),
    }
    busy = threading.Thread(target=actions[what])
    if what in ("call", "warm-up"):
        meanwhile.append(stop)
    if what == "slot":
        monkeypatch.setattr(Bank, "write", writing)
    if what == "merge":
        monkeypatch.setattr(merge, "add_to", lambda *a, own=merge.add_to: (own(*a), stop())[0])
    busy.start()
    assert there.wait(LONG)

    def answer() -> None:
        if what == "generate":
            inputs, names = {"input_ids": torch.ones(2, 4, dtype=torch.long)}, ["a1", None]
            assert "forward" not in vars(lm._orig_mod)
            got, want = lm(**inputs, adapter_names=names).logits, llama.expected(names, inputs)
            assert error(got, want) <= 1e-5
            return
        if what in ("weights", "merge"):
            with pytest.raises(CaptureError, match="load_weights"):
                cm(x=x, adapter_names=MIXED)
            cm.load_weights(own)
        check(cm, case, MIXED, x)
        cm.pin_adapter("c")

    status = _in_child(answer)
    go.set()
    busy.join(LONG)
    assert status == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_fork_while_another_thread_is_in_a_block(pausing):
    torch.set_num_threads(1)
    model = attached(pausing)
    call, x = compiled(model), rows()
    expected = pausing.expected(MIXED, {"x": x})
    assert error(serve(call, model, MIXED, {"x": x}), expected) <= 1e-5
    there, go = threading.Event(), threading.Event()

    def block() -> None:
        with lorafx.adapters(model, ["b", "b"]):
            there.set()
            assert go.wait(LONG)

    (busy := threading.Thread(target=block)).start()
    assert there.wait(LONG)

    def answer() -> None:
        assert error(serve(call, model, MIXED, {"x": x}), expected) <= 1e-5
        lorafx.unload_adapter(model, "b")

    status = _in_child(answer)
    go.set()
    busy.join(LONG)
    assert status == 0
