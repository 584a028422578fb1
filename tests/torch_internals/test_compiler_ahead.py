"""The C++ compiler is asked for what Inductor needs while the first graph is traced."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from waiting import LONG

import lorafx
from lorafx.torch_internals import cpp


def test_what_is_asked_is_there() -> None:
    """What the thread meets is not raised, so it is here."""
    cpp.answer()


@pytest.mark.parametrize(
    ("lowering", "shortcuts", "asks"),
    [("inductor", None, True), ("inductor", [], False), ("reference", None, False)],
)
def test_who_asks(
    lowering: str, shortcuts: list[str] | None, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, caller = threading.Event(), threading.get_ident()

    def answer() -> None:
        assert threading.get_ident() != caller
        asked.set()
        raise RuntimeError("the compiler fails, which only the lowering reports")

    monkeypatch.setattr(cpp, "answer", answer)
    cpp.ask_compiler.cache_clear()
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8))
    options = {"lowering": lowering, "start": "compiled", "cache": None, "shortcuts": shortcuts}
    cm = lorafx.compile(model, lorafx.LoraConfig(target_modules="all-linear"), options=options)
    x = torch.randn(3, 8)
    torch.testing.assert_close(cm(x), model(x))
    assert asked.wait(LONG if asks else 0) == asks
    cpp.ask_compiler.cache_clear()
