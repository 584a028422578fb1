"""Routed experts of one model, Qwen3-MoE: what adapters may be, how batches may be mixed, which way
the base computes its experts; against dense merge. Other models are in test_expert_models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from expert_models import (
    MIXED,
    Pair,
    Projection,
    ids,
    merged_pairs,
    moe_case,
    pairs_of,
    router_names,
    save_older,
)
from torch import nn

import lorafx
from lorafx.errors import MatchError

pytestmark = pytest.mark.any_sizes


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Qwen3-MoE of one layer."""
    return moe_case("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def served(shallow: Case) -> Any:
    """One compiled model for the module: its graphs are shared as in use. Its adapters have the
    first slots."""
    cm = shallow.compile()
    assert cm._session.store.acquire(list(shallow.folders)) == [0, 1, 2, 3]
    return cm


@contextmanager
def also(served: Any, shallow: Case, more: Case) -> Iterator[Case]:
    """Serve the adapters of `more` as well, for a while."""
    for name, folder in more.folders.items():
        served.load_adapter(folder, name)
    try:
        yield Case(shallow.base, shallow.folders | more.folders, {**shallow.merged, **more.merged})
    finally:
        for name in more.folders:
            served.unload_adapter(name)


def of_pairs(base: nn.Module, folder: Path, pairs: dict[str, dict[Projection, Pair]]) -> Case:
    """A `Case` with an adapter of older names for each entry of `pairs`."""
    folders = {name: save_older(folder / name, own) for name, own in pairs.items()}
    return Case(base, folders, {name: merged_pairs(base, own) for name, own in pairs.items()})


def test_mixed_batches(shallow: Case, served: Any) -> None:
    check_mixed(served, shallow, MIXED, ids())
    graphs = served.recompiles
    for seed, (rows, length) in enumerate([(5, 6), (2, 3), (7, 9), (4, 4)]):
        names = ["older", "params", None, "down", "dense", "params", "older"][:rows]
        check_mixed(served, shallow, names, ids(rows, length, seed))
    assert served.recompiles == graphs
    told = str(served.explain())
    assert "[q_proj, k_proj, v_proj]" in told
    assert "refused" not in told


def test_gate_and_up_have_factors_of_their_own(shallow: Case, served: Any, tmp_path: Path) -> None:
    """Adapters that differ in the up projection's A alone give different results, each its own: a
    peer read the gate's A for both."""
    first = pairs_of(shallow.base, lambda _, name: 2 if name != "down_proj" else 0, seed=5)
    other = {
        where: (a.flip(1), b) if where.half == "up" else (a, b) for where, (a, b) in first.items()
    }
    more = of_pairs(shallow.base, tmp_path, {"first": first, "other": other})
    with also(served, shallow, more) as case:
        check_mixed(served, case, ["first", "other", None], ids(3))
        rows = {"input_ids": ids(1)["input_ids"].expand(2, -1)}
        want = case.expected(["first", "other"], rows)
        assert error(want[0], want[1]) > 100 * TOLERANCE
        check_mixed(served, case, ["first", "other"], rows)


@pytest.mark.slow
def test_ways_to_compute_the_experts(shallow: Case) -> None:
    """`set_experts_implementation` before compiling, and after it: the switch is noticed."""
    model = shallow.model()
    model.set_experts_implementation("batched_mm")
    cm = lorafx.compile(model, shallow.folders, options=REFERENCE, dynamic=False)
    check_mixed(cm, shallow, MIXED, ids())
    graphs = cm.recompiles
    model.set_experts_implementation("grouped_mm")
    check_mixed(cm, shallow, MIXED, ids())
    assert cm.recompiles == graphs + 1
    model.set_experts_implementation("batched_mm")
    check_mixed(cm, shallow, MIXED, ids(seed=2))
    assert cm.recompiles == graphs + 1


def test_a_loop_over_experts_is_in_no_graph(shallow: Case) -> None:
    model = shallow.model()
    model.set_experts_implementation("eager")
    cm = lorafx.compile(model, shallow.folders, options=REFERENCE, dynamic=False)
    for names in (MIXED, ["down"] * 5):
        with pytest.raises(
            MatchError, match=r"(?s)layers.0.mlp.experts.*start='eager'.*grouped_mm"
        ):
            cm(**ids(), adapter_names=names)


def test_a_router_changes_the_way_of_its_own_rows(
    shallow: Case, served: Any, tmp_path: Path
) -> None:
    (router,) = router_names(shallow.base)
    folder = oracle.save_adapter(
        shallow.base,
        tmp_path / "router",
        rank=2,
        targets=[],
        gain=4.0,
        target_parameters=[f"{router}.weight"],
    )
    batch = ids(4, 7)
    with also(served, shallow, Case(shallow.base, {"router": folder})) as case:
        check_mixed(served, case, [None, "router", "older", "router"], batch)


@pytest.mark.slow
def test_a_peft_model_with_wrapped_experts_is_taken_over(shallow: Case) -> None:
    with oracle.by_present_names(shallow.model()) as twin:
        model = oracle.PeftModel.from_pretrained(twin, str(shallow.folders["params"]), "params")
    before = dict(model.named_modules()).keys()
    cm = lorafx.compile(model, options=REFERENCE, dynamic=False)
    case = Case(shallow.base, shallow.folders, shallow.merged)
    check_mixed(cm, case, ["params", None, "params"], ids(3))
    cm.detach()
    assert dict(model.named_modules()).keys() == before
