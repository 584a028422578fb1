"""Merging one adapter: the base's graphs over W + ΔW, exact restore, what is refused meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, build_case, check_mixed, error, valid
from tiny_models import plain_inputs, token_inputs
from torch import Tensor

import lorafx
from lorafx.errors import BatchError, CaptureError, ConfigError, MatchError, UnknownAdapterError

NAMES = ["a0", None, "a1", "a3"]


def bits(cm: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in cm._orig_mod.state_dict().items()}


def unchanged(cm: Any, before: dict[str, Tensor]) -> bool:
    state = cm._orig_mod.state_dict()
    return all(torch.equal(state[name], value) for name, value in before.items())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case("plain", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def served(case: Case) -> Any:
    """A compiled model with both its graphs, for batches of more than one request."""
    cm = case.compile()
    inputs = token_inputs(4, 5)
    cm(**inputs)
    cm(**inputs, adapter_names=NAMES)
    return cm


@pytest.fixture
def cm(served: Any) -> Iterator[Any]:
    """The same; each test has to leave the base as it was, but for a merge."""
    before = bits(served)
    yield served
    if served.merged is not None:
        served.unmerge()
    served.set_adapter(None)
    assert unchanged(served, before)


def test_every_call_is_the_adapter_s_and_nothing_is_captured(cm: Any, case: Case) -> None:
    inputs, graphs = token_inputs(4, 5), cm.recompiles
    addresses = {name: p.data_ptr() for name, p in cm._orig_mod.named_parameters()}
    for name in ("a1", "a3"):
        report = cm.merge(name)
        assert cm.merged == name
        want = case.expected([name] * 4, inputs)
        for keywords in ({}, {"adapter_names": [name] * 4}):
            got = cm(**inputs, **keywords)["logits"]
            assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
        # The model itself, called past lorafx, is the merged model.
        with torch.no_grad():
            got = cm._orig_mod(**inputs)["logits"]
        assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
        assert {weight.name.rpartition(".")[0] for weight in report.weights} == set(
            cm._session.store[name].sites
        )
        assert 0 < report.error < 1e-6
        cm.unmerge()
        assert cm.merged is None
        check_mixed(cm, case, NAMES, inputs)
    assert cm.recompiles == graphs
    assert addresses == {name: p.data_ptr() for name, p in cm._orig_mod.named_parameters()}


def test_merged_before_the_first_call_the_base_is_captured(plain: Case, tmp_path: Path) -> None:
    cm = plain.compile({"dump": str(tmp_path)})
    cm.merge("a0")
    inputs = plain_inputs(4, 5)
    got = cm(**inputs, adapter_names=["a0"] * 4)["logits"]
    assert error(got, plain.expected(["a0"] * 4, inputs)) <= TOLERANCE
    (record,) = cm._session.backend.records
    assert not record.lora
    graphs = [path.read_text() for path in tmp_path.glob("*/*.py")]
    assert graphs
    adding = [f"torch.ops.lorafx.{op}" for op in ("site", "embedding_site", "fused_linear", "run_")]
    assert not any(op in graph for graph in graphs for op in adding)
    assert not record.states
    cm.unmerge()
    check_mixed(cm, plain, NAMES, inputs)
    assert cm.recompiles == 2


@pytest.mark.parametrize("names", [["a1"] * 3 + ["a0"], [None] * 4])
def test_calls_that_name_something_else_are_refused(cm: Any, names: list[str | None]) -> None:
    inputs = token_inputs(4, 5)
    cm.merge("a1")
    with pytest.raises(BatchError, match=r"'a1' is merged.* unmerge\(\)"):
        cm(**inputs, adapter_names=names)
    with pytest.raises(BatchError, match=r"unmerge\(\)"):
        cm.generate(**inputs, adapter_names=names, max_new_tokens=2)
    with pytest.raises(BatchError, match="3 entries, but the batch has 4 rows"):
        cm(**inputs, adapter_names=["a1"] * 3)


def test_what_would_change_the_merged_adapter_is_refused(cm: Any, case: Case) -> None:
    with pytest.raises(ConfigError, match="no adapter is merged"):
        cm.unmerge()
    with pytest.raises(UnknownAdapterError, match="nearest: a1"):
        cm.merge("a11")
    for name in ({"a1": 0.5}, ["a1"]):
        with pytest.raises(ConfigError, match="is no name of an adapter"):
            cm.merge(name)
    cm.set_adapter("a2")
    with pytest.raises(ConfigError, match=r"'a2' is in use.*set_adapter\('a1'\)"):
        cm.merge("a1")
    cm.set_adapter("a1")
    cm.merge("a1")
    merged = bits(cm)
    with pytest.raises(ConfigError, match="'a1' is merged already"):
        cm.merge("a1")
    with pytest.raises(ConfigError, match=r"call unmerge\(\) before merging 'a0'"):
        cm.merge("a0")
    with pytest.raises(ConfigError, match=r"unmerge\(\) before it is unloaded"):
        cm.unload_adapter("a1")
    with pytest.raises(ConfigError, match=r"unmerge\(\) before it is replaced"):
        cm.load_adapter(case.folders["a0"], "a1")
    for other in (None, "__base__", "a0"):
        with pytest.raises(ConfigError, match=r"unmerge\(\) before set_adapter"):
            cm.set_adapter(other)
    with pytest.raises(UnknownAdapterError):
        cm.set_adapter("nobody")
    cm.set_adapter("a1")
    assert unchanged(cm, merged)
    lines = [line.strip() for line in str(cm.explain()).splitlines()]
    (merged_line,) = [line for line in lines if ", merged" in line]
    assert merged_line.startswith("a1: ")


def test_weights_that_others_wrote_are_not_overwritten_unasked(plain: Case) -> None:
    cm = plain.compile()
    before = bits(cm)
    cm.merge("a1")
    cm._orig_mod.load_state_dict(before)  # past lorafx
    with pytest.raises(
        CaptureError, match=r"wrote or replaced these weights since.*load_weights\(\) then"
    ):
        cm.unmerge()
    assert cm.merged == "a1"
    cm.unmerge(force=True)
    assert unchanged(cm, before)


def test_what_cannot_be_summed_changes_nothing(plain: Case) -> None:
    """The last weight overflows, when the first are merged already."""
    folder = {"a": plain.folders["a1"]}
    cm = lorafx.compile(plain.model().half(), folder, options={"lowering": "reference"})
    before = bits(cm)
    assert [weight.name for weight in cm.merge("a").weights] == [
        "up.weight",
        "gate.weight",
        "down.weight",
        "head.weight",
    ]
    cm.unmerge()
    for number, factors in cm._session.store["a"].numbers.factors.items():
        for factor in factors:
            if cm._session.program.groups[number].site_of(factor.sibling).path == "head":
                factor.A.fill_(120)
                factor.B.fill_(120)
    with pytest.raises(MatchError, match=r"head\.weight.*beyond the range of torch\.float16"):
        cm.merge("a")
    assert cm.merged is None
    assert unchanged(cm, before)
