"""Calls inside of torch.export and its kin, where tensors have no numbers, leave nothing behind: a
slot that was filled there held the base afterwards."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed
from tiny_models import plain_inputs
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lorafx
from lorafx.errors import CaptureError, MatchError

NAMES = ["a0", "a1"]


@pytest.fixture(scope="module")
def served(plain: Case) -> SimpleNamespace:
    config = lorafx.LoraConfig(max_adapters=2, max_rank=8)
    cm = lorafx.compile(plain.model(), config, adapters=plain.folders, options=REFERENCE)
    return SimpleNamespace(cm=cm, case=plain)


def logits(cm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: cm(ids, adapter_names=NAMES)["logits"]


def mapped(cm: Any, ids: torch.Tensor) -> Any:
    return torch.func.vmap(lambda row: cm(row[None], adapter_names=["a0"])["logits"])(ids)


def fake(action: Callable[[], Any]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return action()


WAYS: dict[str, Callable[[SimpleNamespace, torch.Tensor], Any]] = {
    "export": lambda own, ids: torch.export.export(own.cm, (ids,), {"adapter_names": NAMES}),
    "make_fx": lambda own, ids: make_fx(logits(own.cm))(ids),
    "vmap": lambda own, ids: mapped(own.cm, ids),
    "load": lambda own, _: fake(lambda: own.cm.load_adapter(own.case.folders["a2"], "a0")),
}


@pytest.mark.parametrize("way", WAYS)
def test_refused_and_nothing_has_changed(way: str, served: SimpleNamespace) -> None:
    cm, inputs = served.cm, plain_inputs(2, 4)
    check_mixed(cm, served.case, ["a2", "a3"], inputs)  # those of the call have no slots
    captured = cm.recompiles
    with pytest.raises(CaptureError, match=r"inside of torch\..*Call it outside"):
        WAYS[way](served, inputs["ids"])
    check_mixed(cm, served.case, NAMES, inputs)
    assert cm.recompiles == captured


STRICT = pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["python", "dynamo"]
)


@STRICT
def test_the_model_is_exported_as_calls_have_it(strict: bool, served: SimpleNamespace) -> None:
    """Once it was exported as the base, whatever the default was."""
    cm, ids = served.cm, plain_inputs(2, 4)["ids"]

    def exported() -> torch.Tensor:
        program = torch.export.export(cm._orig_mod, (ids,), strict=strict)
        logits: torch.Tensor = program.module()(ids)["logits"]
        return logits

    base = served.case.expected([None, None], {"ids": ids})
    torch.testing.assert_close(exported(), base)
    cm.set_adapter("a0")
    with pytest.raises(MatchError, match=r"'a0' is the default.*export what export_merged\("):
        exported()
    cm.set_adapter(None)
    torch.testing.assert_close(exported(), base)


@STRICT
def test_an_attached_model_is_exported_when_it_is_detached(strict: bool, plain: Case) -> None:
    model = lorafx.attach(plain.model(), plain.folders, options=REFERENCE)
    ids = plain_inputs(2, 4)["ids"]
    with (
        pytest.raises(RuntimeError, match="disable"),  # torch's own
        lorafx.adapters(model, "a0"),
    ):
        torch.export.export(model, (ids,), strict=strict)
    program = torch.export.export(lorafx.detach(model), (ids,), strict=strict)
    base = plain.expected([None, None], {"ids": ids})
    torch.testing.assert_close(program.module()(ids)["logits"], base)
