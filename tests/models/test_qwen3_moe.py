"""Routed experts of one model, Qwen3-MoE: what adapters may be, how batches may be mixed, which way
the base computes its experts; against dense merge. Other models are in test_expert_models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from expert_models import (
    MIXED,
    Pair,
    Projection,
    check_generated,
    experts_modules,
    ids,
    merged_pairs,
    moe_case,
    older_name,
    pairs_of,
    router_names,
    save_older,
    some,
    write,
)
from hand_made import SCALE
from torch import Tensor, nn

import lorafx
from lorafx.errors import CheckpointError, MatchError


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


def test_under_inductor(shallow: Case) -> None:
    cm = shallow.compile({"lowering": "inductor"}, dynamic=False)
    check_mixed(cm, shallow, MIXED, ids())
    graphs = cm.recompiles
    check_mixed(cm, shallow, ["down", "older", None, "params", "down"], ids(seed=3))
    assert cm.recompiles == graphs


def test_generated_tokens_are_those_of_the_merged_models(shallow: Case, served: Any) -> None:
    check_generated(served, shallow)


def test_one_token_on_one_expert_after_many_on_all(shallow: Case, served: Any) -> None:
    """Nothing of how many rows an expert had when the graph was captured stays in it."""
    check_mixed(served, shallow, MIXED, ids(5, 8, seed=4))
    graphs = served.recompiles
    same = {"input_ids": torch.full((5, 8), 7)}  # every token of a row goes the same way
    check_mixed(served, shallow, MIXED, same)
    assert served.recompiles == graphs


@pytest.mark.parametrize("name", ["params", "older"])
def test_rows_have_their_own_adapter_alone(shallow: Case, served: Any, name: str) -> None:
    """A peer applied slot 0, which "params" has here, to every row."""
    assert served._session.store.acquire(["params"]) == [0]
    for names in ([name, None, None, name, None], [None] * 5, [None, name, None, None]):
        batch = ids(len(names), 5, seed=len(names))
        got = served(**batch, adapter_names=names)["logits"]
        want, base = (shallow.expected(who, batch) for who in (names, [None] * len(names)))
        for row, who in enumerate(names):
            assert error(got[row], want[row]) <= TOLERANCE
            assert (error(got[row], base[row]) <= TOLERANCE) == (who is None)


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


def test_a_loop_over_experts_is_refused(shallow: Case) -> None:
    model = shallow.model()
    model.set_experts_implementation("eager")
    cm = lorafx.compile(model, shallow.folders, options=REFERENCE, dynamic=False)
    for names in (MIXED, ["down"] * 5):
        with pytest.raises(MatchError, match=r"(?s)layers.0.mlp.experts.*grouped_mm"):
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
        ways = [_chosen(case.alone(name), router, batch) for name in (None, "router")]
    assert not torch.equal(*ways)


def _chosen(model: nn.Module, router: str, batch: dict[str, Tensor]) -> Tensor:
    """The experts that each token goes to."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = torch.nn.functional.linear(args[0].flatten(0, -2), module.weight)
        seen.append(logits.topk(2).indices.sort().values)

    hook = model.get_submodule(router).register_forward_hook(note)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


def test_gates_and_experts_with_two_names(shallow: Case, tmp_path: Path) -> None:
    """An alias is the same module: its delta is added once, under whichever name it was saved."""
    model = shallow.model()
    block = model.model.layers[0].mlp
    block.router, block.routed = block.gate, block.experts
    pairs = pairs_of(shallow.base, some, seed=6)
    router = shallow.base.model.layers[0].mlp.gate
    n, k = router.weight.shape
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((1, k), (n, 1)))

    def tensors(gate: str, experts: str) -> dict[str, Tensor]:
        found = {
            f"{older_name(where).replace('.experts.', f'.{experts}.')}.lora_{letter}.weight": t
            for where, pair in pairs.items()
            for letter, t in zip("AB", pair, strict=True)
        }
        path = f"model.layers.0.mlp.{gate}"
        return {**found, f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}

    ranks = {
        older_name(where).replace(".experts.", f".{name}."): pair[0].shape[0]
        for where, pair in pairs.items()
        for name in ("experts", "routed")
    }
    config = {
        "rank_pattern": ranks,
        "alpha_pattern": {path: SCALE * rank for path, rank in ranks.items()},
    }
    folders = {
        "own": write(tmp_path / "own", tensors("gate", "experts"), **config),
        "alias": write(tmp_path / "alias", tensors("router", "routed"), **config),
    }
    want = merged_pairs(shallow.base, pairs)
    with torch.no_grad():
        want.model.layers[0].mlp.gate.weight += SCALE * (b @ a)
    case = Case(shallow.base, folders, dict.fromkeys(folders, want))
    alone = lorafx.explain(model, {"alias": folders["alias"]})
    cm = lorafx.compile(model, folders, options=REFERENCE, dynamic=False)
    assert len(cm.sites) == 3
    assert all(site.path in str(alone) for site in cm.sites)
    check_mixed(cm, case, ["own", None, "alias"], ids(3))


def test_one_factor_for_all_experts(shallow: Case, served: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    (path, module), *_ = experts_modules(shallow.base)
    count, n, k = module.down_proj.shape
    more = Case(shallow.base, {})
    for name, a_shape, b_shape in (
        ("one A", (2, k), (count, n, 2)),
        ("one B", (count, 2, k), (n, 2)),
    ):
        a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in (a_shape, b_shape))
        tensors = {f"{path}.down_proj.lora_A": a, f"{path}.down_proj.lora_B": b}
        more.folders[name] = write(tmp_path / name, tensors, r=2, lora_alpha=2 * SCALE)
        more.merged[name] = copy.deepcopy(shallow.base)
        with torch.no_grad():
            more.merged[name].get_submodule(path).down_proj += SCALE * (b @ a)
    with also(served, shallow, more) as case:
        check_mixed(served, case, ["one A", None, "one B", "params"], ids(4))


def test_targets_from_a_peft_configuration(shallow: Case) -> None:
    """A configuration with target_parameters names the same sites as the adapter's keys."""
    peft = oracle.LoraConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "mlp.gate.weight"],
    )
    cm = lorafx.compile(shallow.model(), peft, options=REFERENCE)
    assert sorted(site.path.partition("layers.0.")[2] for site in cm.sites) == [
        "mlp.experts.gate_up_proj",
        "mlp.gate",
        "self_attn.q_proj",
    ]
    with pytest.raises(CheckpointError, match="down_proj exists but was not selected"):
        cm.load_adapter(shallow.folders["down"], "down")


def test_an_adapter_for_more_experts_is_refused(shallow: Case, served: Any, tmp_path: Path) -> None:
    (path, module), *_ = experts_modules(shallow.base)
    hidden, inner = module.down_proj.shape[1:]
    pair = {"A": torch.ones(1, hidden), "B": torch.ones(inner, 1)}
    tensors = {f"{path}.9.gate_proj.lora_{letter}.weight": t for letter, t in pair.items()}
    before = served.adapters
    folder = write(tmp_path / "more", tensors)
    with pytest.raises(CheckpointError, match="it was made for a model with more"):
        served.load_adapter(folder, "more")
    assert served.adapters == before
    check_mixed(served, shallow, MIXED, ids(seed=9))


def test_a_peft_model_with_wrapped_experts_is_taken_over(shallow: Case) -> None:
    with oracle.by_present_names(shallow.model()) as twin:
        model = oracle.PeftModel.from_pretrained(twin, str(shallow.folders["params"]), "params")
    before = dict(model.named_modules()).keys()
    cm = lorafx.compile(model, options=REFERENCE, dynamic=False)
    case = Case(shallow.base, shallow.folders, shallow.merged)
    check_mixed(cm, case, ["params", None, "params"], ids(3))
    cm.detach()
    assert dict(model.named_modules()).keys() == before
