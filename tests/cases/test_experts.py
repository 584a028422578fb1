"""Mixture-of-experts models: adapters of both naming generations on experts, routers, shared
experts and attention, mixed in one batch, against dense merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from expert_models import (
    experts_modules,
    merged_pairs,
    moe_base,
    moe_case,
    older_name,
    pairs_of,
    router_names,
    save_older,
    some,
    write,
)
from hand_made import SCALE
from torch import nn

import lorafx
from lorafx.errors import CheckpointError

NAMES = ["params", None, "older", "down", "dense"]
NEW = 4

#: Model types and how many layers are kept of them; all where None.
SHORT = {"qwen3_moe": None, "mixtral": 1, "deepseek_v3": None, "gpt_oss": 1, "llama4": 1}
LONG = ["olmoe", "glm4_moe", "granitemoe", "qwen2_moe", "qwen3_next"]


def ids(rows: int = 5, length: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 100, (rows, length), generator=generator)}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Qwen3-MoE of one layer."""
    return moe_case("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), layers=1)


@pytest.fixture(scope="module")
def served(shallow: Case) -> Any:
    """One compiled model for the module: its graphs are shared as in use."""
    return shallow.compile()


@pytest.mark.parametrize(
    "model_type", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
)
def test_mixed_batches(model_type: str, tmp_path: Path) -> None:
    case = moe_case(model_type, tmp_path, layers=SHORT.get(model_type))
    cm = case.compile()
    paths = [site.path for site in cm.sites]
    for path, _ in experts_modules(case.base):
        assert {f"{path}.gate_up_proj", f"{path}.down_proj"} <= set(paths)
    assert set(router_names(case.base)) <= set(paths)
    shared = [path for path in oracle.linears(case.base) if "shared_expert" in path]
    assert set(shared) <= set(paths)
    check_mixed(cm, case, NAMES, ids())
    graphs = cm.recompiles
    # The same graph for other tokens, adapters in other slots, and so other counts an expert.
    check_mixed(cm, case, ["older", "down", "params", None, "older"], ids(seed=2))
    assert cm.recompiles == graphs


@pytest.mark.parametrize(("rows", "length"), [(5, 1), (2, 3), (7, 9)])
def test_shapes(shallow: Case, served: Any, rows: int, length: int) -> None:
    names = (["older", "params", None, "down", "dense", "params", "older"])[:rows]
    check_mixed(served, shallow, names, ids(rows, length, seed=rows))


def test_under_inductor(shallow: Case) -> None:
    cm = shallow.compile({"lowering": "inductor"})
    check_mixed(cm, shallow, NAMES, ids())
    graphs = cm.recompiles
    check_mixed(cm, shallow, ["down", "older", None, "params", "down"], ids(seed=3))
    assert cm.recompiles == graphs


def test_generated_tokens_are_those_of_the_merged_models(shallow: Case, served: Any) -> None:
    fixed = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    fixed |= {"min_new_tokens": NEW, "max_new_tokens": NEW}
    inputs = {**ids(), "attention_mask": torch.ones(5, 6, dtype=torch.long)}
    got = served.generate(**inputs, **fixed, adapter_names=NAMES)
    rows = [
        shallow.alone(name).generate(**oracle.one_row(inputs, index), **fixed)
        for index, name in enumerate(NAMES)
    ]
    assert torch.equal(got, torch.cat(rows))
    base = shallow.base.generate(**inputs, **fixed)
    assert int((got != base).any(1).sum()) >= 2


def test_one_token_on_one_expert_after_many_on_all(shallow: Case, served: Any) -> None:
    """Nothing of how many rows an expert had when the graph was captured stays in it."""
    check_mixed(served, shallow, NAMES, ids(5, 8, seed=4))
    graphs = served.recompiles
    same = {"input_ids": torch.full((5, 8), 7)}  # every token of a row goes the same way
    check_mixed(served, shallow, NAMES, same)
    assert served.recompiles == graphs


def test_only_its_own_rows_have_the_adapter_of_slot_0(shallow: Case) -> None:
    cm = lorafx.compile(
        shallow.model(),
        lorafx.LoraConfig(target_modules=["experts"], max_adapters=3, max_rank=4),
        adapters={"older": shallow.folders["older"]},
        options=REFERENCE,
    )
    assert cm._session.store.acquire(["older"]) == [0]
    for names in (["older", None, None, "older", None], [None] * 5, [None, "older", None, None]):
        batch = ids(len(names), 5, seed=len(names))
        got = cm(**batch, adapter_names=names)["logits"]
        assert error(got, shallow.expected(names, batch)) <= TOLERANCE
        base = shallow.expected([None] * len(names), batch)
        for row, name in enumerate(names):
            assert (error(got[row], base[row]) <= TOLERANCE) == (name is None)


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)]
)
def test_gate_and_up_have_factors_of_their_own(model_type: str, tmp_path: Path) -> None:
    """Adapters that differ in the up projection's A alone give different results, each its own."""
    base = moe_base(model_type, layers=1).requires_grad_(False)
    first = pairs_of(base, lambda _, name: 2 if name != "down_proj" else 0, seed=5)
    other = {
        where: (a.flip(1), b) if where.half == "up" else (a, b) for where, (a, b) in first.items()
    }
    case = Case(base, {})
    for name, pairs in (("first", first), ("other", other)):
        case.folders[name] = save_older(tmp_path / name, pairs)
        case.merged[name] = merged_pairs(base, pairs)
    batch = ids(3)
    check_mixed(case.compile(), case, ["first", "other", None], batch)
    rows = {"input_ids": batch["input_ids"][:1].expand(2, -1)}
    want = case.expected(["first", "other"], rows)
    assert error(want[0], want[1]) > 100 * TOLERANCE


def test_a_router_changes_the_way_of_its_own_rows(tmp_path: Path) -> None:
    base = moe_base("qwen3_moe", layers=1).requires_grad_(False)
    (router,) = router_names(base)
    folder = oracle.save_adapter(
        base,
        tmp_path / "router",
        rank=2,
        targets=[],
        gain=4.0,
        target_parameters=[f"{router}.weight"],
    )
    case = Case(base, {"router": folder})
    names, batch = [None, "router", None, "router"], ids(4, 7)
    cm = case.compile()
    assert [site.path for site in cm.sites] == [router]
    check_mixed(cm, case, names, batch)
    ways = [_chosen(case.alone(name), router, batch) for name in (None, "router")]
    assert not torch.equal(*ways)


def _chosen(model: nn.Module, router: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The experts that each token goes to."""
    seen: list[torch.Tensor] = []

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

    def tensors(gate: str, experts: str) -> dict[str, torch.Tensor]:
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
    cm = lorafx.compile(model, folders, options=REFERENCE)
    assert len(cm.sites) == 3
    assert all(site.path in str(alone) for site in cm.sites)
    check_mixed(cm, case, ["own", None, "alias"], ids(3))


def test_one_factor_for_all_experts(shallow: Case, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    (path, module), *_ = experts_modules(shallow.base)
    count, n, k = module.down_proj.shape
    case = Case(shallow.base, {})
    for name, a_shape, b_shape in (
        ("one A", (2, k), (count, n, 2)),
        ("one B", (count, 2, k), (n, 2)),
    ):
        a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in (a_shape, b_shape))
        tensors = {f"{path}.down_proj.lora_A": a, f"{path}.down_proj.lora_B": b}
        case.folders[name] = write(tmp_path / name, tensors, r=2, lora_alpha=2 * SCALE)
        case.merged[name] = copy.deepcopy(shallow.base)
        with torch.no_grad():
            case.merged[name].get_submodule(path).down_proj += SCALE * (b @ a)
    check_mixed(case.compile(), case, ["one A", None, "one B"], ids(3))


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
    check_mixed(served, shallow, NAMES, ids(seed=9))


def test_a_peft_model_with_wrapped_experts_is_taken_over(shallow: Case) -> None:
    with oracle.by_present_names(shallow.model()) as twin:
        model = oracle.PeftModel.from_pretrained(twin, str(shallow.folders["params"]), "params")
    before = dict(model.named_modules()).keys()
    cm = lorafx.compile(model, options=REFERENCE)
    case = Case(shallow.base, shallow.folders, shallow.merged)
    check_mixed(cm, case, ["params", None, "params"], ids(3))
    cm.detach()
    assert dict(model.named_modules()).keys() == before
