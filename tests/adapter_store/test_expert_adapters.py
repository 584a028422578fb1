"""Reading adapters of routed experts, against PEFT's formula written out index by index.

stored (E, d1, d2), PEFT takes d2 as the input unless `is_transposed` (before 0.19: d1)
ΔW[e] [o, i] = s · Σ_j B[o, j·E + e] A[e·r + j, i]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_files import PATH, Model, delta, noise, pair, read, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.errors import CapacityError, CheckpointError
from lorafx.runtime.marking import build_sites


def peft_delta(stored: tuple[int, ...], a: Tensor, b: Tensor, s: float, in_last: bool) -> Tensor:
    """PEFT's formula, one index at a time; `in_last` where it takes d2 as the input."""
    experts, first, last = stored
    r = a.shape[0] // experts
    made = torch.zeros(stored)
    for e in range(experts):
        for x in range(first):
            for y in range(last):
                o, i = (x, y) if in_last else (y, x)
                made[e, x, y] = s * sum(b[o, j * experts + e] * a[e * r + j, i] for j in range(r))
    return made


@st.composite
def peft_files(draw: st.DrawFn) -> tuple[dict[str, Any], list[str], str, tuple[int, int]]:
    form = {
        "experts": draw(st.integers(1, 4)),
        "hidden": draw(st.integers(1, 5)),
        "inner": draw(st.integers(1, 4)),
        "transposed": draw(st.booleans()),
        "declared": draw(st.booleans()),
        "halves": draw(st.sampled_from(["stacked", "interleaved", ""])),
        "down_first": draw(st.booleans()),
    }
    names = draw(st.sampled_from([["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]]))
    ranks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return form, names, draw(st.sampled_from(["0.18.1", "0.21.2"])), ranks


@given(peft_files(), st.booleans())
@settings(max_examples=60)
def test_what_peft_saves(file: tuple, named: bool) -> None:
    """One parameter or two on one module, however it is stored and whichever comes first."""
    form, names, version, ranks = file
    model = Model(**form)
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["experts"]))
    # Where the module does not declare it and the shapes fit both, it is read as not transposed.
    if sites[0].eligible.transposed != form["transposed"]:
        return
    rank_of = dict(zip(["gate_up_proj", "down_proj"], ranks, strict=True))
    registered = [n for n in model.block.experts._parameters if n in names]
    tensors, expected = {}, {}
    for at, name in enumerate(registered):
        inner = len(registered) == 2 and at == 0
        saved = f"{PATH}.base_layer" if inner else PATH
        shape = tuple(model.block.experts._parameters[name].shape)
        declared = form["declared"] and form["transposed"]
        in_last = version != "0.18.1" and not declared
        i, o = (shape[2], shape[1]) if in_last else (shape[1], shape[2])
        rows = rank_of[name] * shape[0]
        own = pair((rows, i), (o, rows), saved, seed=at)
        tensors.update(own)
        a, b = own.values()
        expected[name] = peft_delta(shape, a, b, 3 / rank_of[name], in_last)
    config: dict[str, Any] = {
        "rank_pattern": {f"experts.{n}": r for n, r in rank_of.items()},
        "peft_version": version,
    }
    if named or len(names) == 1:
        config["target_parameters"] = [f"experts.{n}" for n in names]
    adapter = read(model, tensors, **config)
    for name in ("gate_up_proj", "down_proj"):
        found = delta(model, adapter, name)
        want = expected.get(name, torch.zeros_like(found))
        assert torch.allclose(found, want, atol=1e-5), (name, form)


def test_a_square_parameter_needs_the_version_that_wrote_it() -> None:
    square = Model(hidden=4, inner=2)
    tensors = pair((6, 4), (4, 6), PATH)
    shape, (a, b) = (3, 4, 4), tensors.values()
    config = {"target_parameters": ["experts.gate_up_proj"], "alpha_pattern": {}, "lora_alpha": 2}
    for version, in_last in (("0.18.1", False), ("0.19.0", True), ("1.2", True)):
        adapter = read(square, tensors, peft_version=version, **config)
        want = peft_delta(shape, a, b, 1.0, in_last)
        assert torch.allclose(delta(square, adapter, "gate_up_proj"), want, atol=1e-5)
    with pytest.raises(CheckpointError, match="lacks peft_version"):
        read(square, tensors, peft_version=None, **config)


@st.composite
def older_files(draw: st.DrawFn) -> tuple[str, bool, list[tuple[str, int, int, float]]]:
    """(halves, transposed, [(projection, expert, rank, alpha)])."""
    halves = draw(st.sampled_from(["stacked", "interleaved", ""]))
    kinds = ["up_proj", "down_proj"] if halves == "" else ["gate_proj", "up_proj", "down_proj"]
    chosen = draw(
        st.lists(
            st.tuples(
                st.sampled_from(kinds),
                st.integers(0, 2),
                st.integers(1, 3),
                st.sampled_from([0.0, 1.0, 2.5]),
            ),
            min_size=1,
            max_size=9,
            unique_by=lambda item: item[:2],
        )
    )
    return halves, draw(st.booleans()), chosen


@given(older_files(), st.booleans())
@settings(max_examples=50)
def test_a_pair_for_each_expert_and_projection(file: tuple, mixtral: bool) -> None:
    """Gate and up keep factors of their own, whatever ranks and scales they have."""
    halves, transposed, chosen = file
    model = Model(halves=halves, transposed=transposed)
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors: dict[str, Tensor] = {}
    expected = {"gate_up_proj": torch.zeros(3, 8 if halves else 4, 5)}
    expected["down_proj"] = torch.zeros(3, 5, 4)
    ranks, alphas = {}, {}
    for name, expert, rank, alpha in chosen:
        path = f"{PATH}.{expert}.{words[name] if mixtral else name}"
        k, n = (4, 5) if name == "down_proj" else (5, 4)
        own = pair((rank, k), (n, rank), path, seed=expert)
        tensors.update(own)
        ranks[path], alphas[path] = rank, alpha
        a, b = own.values()
        whole = expected["down_proj" if name == "down_proj" else "gate_up_proj"][expert]
        if name != "down_proj" and halves == "stacked":
            whole = whole[:4] if name == "gate_proj" else whole[4:]
        elif name != "down_proj" and halves == "interleaved":
            whole = whole[0::2] if name == "gate_proj" else whole[1::2]
        whole += alpha / rank * (b @ a)
    adapter = read(model, tensors, max_rank=3, rank_pattern=ranks, alpha_pattern=alphas)
    assert adapter.rank == max(ranks.values())
    for name, want in expected.items():
        found = delta(model, adapter, name)
        assert torch.allclose(found.mT if transposed else found, want, atol=1e-5)


#: For A (r, 4) and B (5, r) of down_proj, three experts: what each expert's factors are.
FORMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable, Callable]] = {
    "apart": ((3, 2, 4), (3, 5, 2), lambda a, e: a[e], lambda b, e: b[e]),
    "one A": ((2, 4), (3, 5, 2), lambda a, e: a, lambda b, e: b[e]),
    "one B": ((3, 2, 4), (5, 2), lambda a, e: a[e], lambda b, e: b),
    "one A of three dimensions": ((1, 2, 4), (3, 5, 2), lambda a, e: a[0], lambda b, e: b[e]),
    "one B of three dimensions": ((3, 2, 4), (1, 5, 2), lambda a, e: a[e], lambda b, e: b[0]),
    "one of each": ((1, 2, 4), (1, 5, 2), lambda a, e: a[0], lambda b, e: b[0]),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_factors_of_all_experts(form: str) -> None:
    model = Model()
    a_shape, b_shape, own_a, own_b = FORMS[form]
    tensors = pair(a_shape, b_shape, f"{PATH}.w2")
    a, b = tensors.values()
    found = delta(model, read(model, tensors), "down_proj")
    want = torch.stack([1.5 * own_b(b, e) @ own_a(a, e) for e in range(3)])
    assert torch.allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5), (1, 2, 5)])
def test_a_shared_factor_beside_those_of_single_experts(shape: tuple[int, ...]) -> None:
    """As Megatron-Bridge writes them. Expert 1, which has no B, keeps its weights."""
    model, a = Model(halves="interleaved"), noise(*shape)
    own = {f"{PATH}.{e}.up_proj.lora_B": noise(4, 2, seed=e) for e in (0, 2)}
    found = delta(model, read(model, {f"{PATH}.up_proj.lora_A": a, **own}), "gate_up_proj")
    want = torch.zeros(3, 8, 5)
    for e in (0, 2):
        want[e, 1::2] = 1.5 * own[f"{PATH}.{e}.up_proj.lora_B"] @ a.reshape(2, 5)
    assert torch.allclose(found, want, atol=1e-5)


def test_factors_that_are_stacked_in_both_wrappers() -> None:
    """As vLLM stacks them; square parameters need no version, since no release exchanges these."""
    model = Model(hidden=4, inner=2)
    tensors = {
        **pair((3, 2, 4), (4, 2, 3), f"{PATH}.base_layer"),
        **pair((3, 1, 2), (4, 1, 3), PATH, seed=3),
    }
    adapter = read(model, tensors, peft_version=None, rank_pattern={"experts.down_proj": 1})
    for name, path, s in (("gate_up_proj", f"{PATH}.base_layer", 1.5), ("down_proj", PATH, 3)):
        a, b = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
        want = torch.stack([s * b[:, :, e] @ a[e] for e in range(3)])
        assert torch.allclose(delta(model, adapter, name), want, atol=1e-5)


def test_tinkers_names_of_experts_without_a_gate() -> None:
    model = Model(halves="")
    nothing = dict.fromkeys((f"{PATH}.w3.lora_A", f"{PATH}.w3.lora_B"), torch.empty(0))
    up = pair((1, 2, 5), (3, 4, 2), f"{PATH}.w1")
    a, b = up.values()
    found = delta(model, read(model, {**up, **nothing}), "gate_up_proj")
    assert torch.allclose(found, 1.5 * b @ a, atol=1e-5)
    with pytest.raises(
        CheckpointError, match=r"w3\S+: shapes \(0,\) and \(0,\) are not \(3, r, 5\)"
    ):
        read(Model(), {**pair((1, 2, 5), (3, 4, 2), f"{PATH}.w1"), **nothing})


BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "expert out of range": (
        pair((2, 5), (4, 2), f"{PATH}.7.gate_proj"),
        {},
        r"experts\.7\.gate_proj\S*: block\.experts has 3 experts here \(0 … 2\)",
    ),
    "another number, divisible": (
        pair((12, 4), (5, 12), PATH),
        {},
        r"12 rows, which at the rank 2 of adapter_config.json are those of 6 experts",
    ),
    "neither parameter": (pair((6, 7), (9, 6), PATH), {}, "fit neither gate_up_proj and down_proj"),
    "no B": ({f"{PATH}.0.w2.lora_A": noise(2, 4)}, {}, "has no factor B"),
    "NaN": (
        {f"{PATH}.0.w2.lora_A": noise(2, 4) / 0, f"{PATH}.0.w2.lora_B": noise(5, 2)},
        {},
        "NaN or infinite",
    ),
    "an unknown projection": (
        {**pair((2, 4), (5, 2), f"{PATH}.0.w2"), **pair((2, 4), (5, 2), f"{PATH}.0.w7")},
        {},
        r"block.experts.0.w7: no such module",
    ),
    "the whole and its half": (
        {**pair((2, 5), (8, 2), f"{PATH}.0.w13"), **pair((2, 5), (4, 2), f"{PATH}.0.w1")},
        {},
        "both have factors for the same columns",
    ),
    "one pair or stacked": (
        pair((6, 4), (5, 6), f"{PATH}.down_proj"),
        {},
        r"\(6, 4\) and \(5, 6\) are not \(3, r, 4\) and \(3, 5, r\), of which one may be shared",
    ),
    "a shared A without any B": ({f"{PATH}.w2.lora_A": noise(1, 2, 4)}, {}, "has no factor B"),
    "a shared A of another rank": (
        {f"{PATH}.w2.lora_A": noise(1, 3, 4), f"{PATH}.0.w2.lora_B": noise(5, 2)},
        {},
        r"w2.lora_B\S* has shape \(5, 2\), \S+ needs \(5, r = 3\)",
    ),
    "a shared A of two": (
        {f"{PATH}.w2.lora_A": noise(2, 2, 4), f"{PATH}.0.w2.lora_B": noise(5, 2)},
        {},
        r"w2.lora_A\S* has shape \(2, 2, 4\)",
    ),
    "a shared A beside another": (
        {**pair((2, 4), (5, 2), f"{PATH}.0.w2"), f"{PATH}.w2.lora_A": noise(1, 2, 4)},
        {},
        "has no factor B",
    ),
    "shared by two of three": (
        pair((2, 2, 4), (3, 5, 2), f"{PATH}.w2"),
        {},
        r"\(2, 2, 4\) and \(3, 5, 2\) are not \(3, r, 4\)",
    ),
    "stacked for another number": (
        pair((4, 2, 4), (5, 2, 4), PATH),
        {"target_parameters": ["experts.down_proj"]},
        r"\(4, 2, 4\)",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str) -> None:
    tensors, config, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        read(Model(), tensors, **config)


@pytest.mark.quick
def test_targeted_parameters_without_factors() -> None:
    tensors = pair((6, 4), (5, 6), PATH)
    targets = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]
    message = r"2 of them \(67 %\): block.router, block.experts.gate_up_proj"
    with pytest.warns(lorafx.LorafxWarning, match=message):
        adapter = read(Model(), tensors, target_parameters=targets)
    assert list(adapter.weights) == [f"{PATH}.down_proj"]


@pytest.mark.quick
def test_a_rank_over_what_the_banks_hold() -> None:
    tensors = {
        **pair((2, 5), (4, 2), f"{PATH}.0.gate_proj"),
        **pair((2, 5), (4, 2), f"{PATH}.0.up_proj", seed=2),
    }
    interleaved = Model(halves="interleaved")
    assert read(interleaved, tensors, max_rank=2).rank == 2
    with pytest.raises(CapacityError, match="rank 2 is over max_rank = 1"):
        read(interleaved, tensors, max_rank=1)


@pytest.mark.quick
def test_experts_that_were_not_selected() -> None:
    model = Model()
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["down_proj"]))
    for tensors in (pair((2, 5), (4, 2), f"{PATH}.0.w1"), pair((6, 5), (8, 6), PATH)):
        with pytest.raises(CheckpointError, match=r"gate_up_proj exists but was not selected"):
            read_adapter(state_of(tensors), "a", sites, model=model)
