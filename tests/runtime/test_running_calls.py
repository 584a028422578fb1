"""What may not happen while a call runs: from its own thread and from others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attached import fresh_dynamo
from dense_merge import Case, error
from pausing import MIXED, check, meanwhile, pausing, rows, served
from torch import Tensor
from waiting import LONG

from lorafx.errors import BatchError, CapacityError

__all__ = ["fresh_dynamo", "meanwhile", "pausing"]


@pytest.fixture(scope="module")
def lm(llama: Case) -> Any:
    """A language model that tests share, for prompts of any length."""
    return llama.compile()


def test_a_pin_on_another_thread_waits_for_the_call(pausing, meanwhile):
    """There is no free slot: it would take one that the running forward reads."""
    cm, x = served(pausing), rows()
    check(cm, pausing, MIXED, x)
    pins: list[threading.Thread] = []

    def pin() -> None:
        pins.append(threading.Thread(target=cm.pin_adapter, args=("c",)))
        pins[-1].start()
        pins[-1].join(0.3)

    meanwhile.append(pin)
    check(cm, pausing, MIXED, x)
    pins[0].join(LONG)
    assert not pins[0].is_alive()
    assert "c" in cm._session.store.resident


INSIDE: list[Callable[[Any, Case], Any]] = [
    lambda cm, case: cm.unload_adapter("a"),
    lambda cm, case: cm.load_adapter(case.folders["c"], "a"),
    lambda cm, case: cm.pin_adapter("c"),
    lambda cm, case: cm.set_adapter("b"),
    lambda cm, case: cm.detach(),
    lambda cm, case: cm.merge("a"),
    lambda cm, case: cm.unmerge(),
    lambda cm, case: cm.load_weights(case.base.state_dict()),
]


def test_refused_inside_of_a_forward(pausing, meanwhile):
    """On the call's own thread there is nothing to wait for: the second layer would have served
    other adapters than the first."""
    cm, x = served(pausing), rows()
    check(cm, pausing, MIXED, x)

    def act() -> None:
        for what in INSIDE:
            with pytest.raises(BatchError, match="is running"):
                what(cm, pausing)

    meanwhile.append(act)
    check(cm, pausing, MIXED, x)
    meanwhile.clear()
    check(cm, pausing, MIXED, x)


@pytest.mark.one_road  # what runs meanwhile runs once
def test_a_call_inside_of_a_forward_takes_no_slot_from_it(pausing, meanwhile):
    cm, x = served(pausing), rows()
    check(cm, pausing, MIXED, x)
    ran: list[Tensor] = []
    inside = rows(2)
    want = pausing.expected(["b", None], {"x": inside})

    def act() -> None:
        got = cm(x=inside, adapter_names=["b", None])["logits"]
        with pytest.raises(CapacityError, match="a, b are pinned, or used by the call around"):
            cm(x=rows(1), adapter_names=["c"])
        ran.append(got)

    meanwhile.append(act)
    check(cm, pausing, MIXED, x)
    assert error(ran[0], want) <= 1e-5
    check(cm, pausing, ["c", None, "b"], x)


@pytest.mark.slow
def test_what_a_streamer_may_do(llama, lm):
    cm = lm
    prompt, names = {"input_ids": torch.ones(1, 3, dtype=torch.long)}, ["a0"]
    seen: list[Any] = []

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            if not seen:
                cm.load_adapter(llama.folders["a2"], "new")
                for act in (
                    lambda: cm.load_adapter(llama.folders["a2"], "a0"),
                    lambda: cm.unload_adapter("a0"),
                    lambda: cm.set_adapter("a1"),
                ):
                    with pytest.raises(BatchError, match="is running"):
                        act()
            elif len(seen) == 1:
                got = cm(**prompt, adapter_names=["new"]).logits
                assert error(got, llama.expected(["a2"], prompt)) <= 1e-5
            seen.append(tokens)

        def end(self) -> None: ...

    settings = {"max_new_tokens": 4, "do_sample": False}
    streamed = cm.generate(**prompt, **settings, adapter_names=names, streamer=Streamer())
    assert torch.equal(streamed, llama.alone("a0").generate(**prompt, **settings))
    assert len(seen) == 5
    cm.unload_adapter("new")


def elsewhere(action: Callable[[], Any]) -> list[Any]:
    """What `action` returns, or raises, on another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LONG)
    return found


def test_the_model_itself_on_another_thread_is_no_part_of_the_call(pausing, meanwhile):
    """It would get the adapters of the call."""
    cm, x = served(pausing), rows()
    check(cm, pausing, MIXED, x)
    found: list[Any] = []
    meanwhile.append(lambda: found.extend(elsewhere(lambda: cm._orig_mod(x=x))))
    check(cm, pausing, MIXED, x)
    with pytest.raises(BatchError, match=r"another thread is in a call .* adapter_names=\[None, "):
        raise found[0]
    (base,) = elsewhere(lambda: cm._orig_mod(x=x)["logits"])
    assert error(base, pausing.expected([None] * 3, {"x": x})) <= 1e-5


def test_nor_is_it_of_generate(llama, lm):
    """Whose compiled forwards stand in for those of the model meanwhile."""
    cm, inputs = lm, {"input_ids": torch.arange(1, 7)[None]}
    found: list[Any] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            found.extend(elsewhere(lambda: cm._orig_mod(**inputs)))

        def end(self) -> None:
            found.extend(elsewhere(lambda: cm._orig_mod.generate(**inputs, max_new_tokens=1)))

    cm.generate(**inputs, adapter_names=["a0"], max_new_tokens=2, streamer=Streamer())
    assert len(found) >= 3
    assert {type(error) for error in found} == {BatchError}
    (got,) = elsewhere(lambda: cm._orig_mod(**inputs).logits)
    assert error(got, llama.expected([None], inputs)) <= 1e-5
