"""Reading adapters of routed experts, against PEFT's formula written out index by index.

stored (E, d1, d2), PEFT takes d2 as the input unless `is_transposed` (before 0.19: d1)
ΔW[e] [o, i] = s · Σ_j B[o, j·E + e] A[e·r + j, i]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_files import PATH, Model, delta, pair, read, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorafx
from lorafx.adapter_store.peft_reader import adapter_target_modules
from lorafx.errors import CheckpointError
from lorafx.prepare.marking import build_sites


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
@settings(max_examples=120, deadline=None)
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


def test_a_parameter_alone_is_told_by_its_shapes_or_by_the_configuration() -> None:
    model = Model()
    adapter = read(model, pair((6, 4), (5, 6), PATH))
    assert set(adapter.weights) == {f"{PATH}.down_proj"}
    square = Model(hidden=4, inner=4, halves="")
    alike = pair((6, 4), (4, 6), PATH)
    with pytest.raises(CheckpointError, match="does not say which of them was trained"):
        read(square, alike)
    adapter = read(square, alike, target_parameters=["experts.down_proj"])
    assert set(adapter.weights) == {f"{PATH}.down_proj"}


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


def test_rank_and_alpha_by_the_name_of_the_parameter() -> None:
    model = Model()
    tensors = {**pair((9, 5), (8, 9), f"{PATH}.base_layer"), **pair((3, 4), (5, 3), PATH)}
    adapter = read(
        model,
        tensors,
        r=7,
        rank_pattern={"experts.gate_up_proj": 3, "block.experts.down_proj": 1},
        alpha_pattern={"gate_up_proj": 12},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    assert adapter.rank == 3
    scales = {path.rpartition(".")[2]: float(w.scale[0]) for path, w in adapter.weights.items()}
    assert scales == {"gate_up_proj[0]": 4, "gate_up_proj[1]": 4, "down_proj": 3}


def test_the_matrix_of_a_router_is_a_linear() -> None:
    model = Model()
    adapter = read(
        model,
        pair((2, 5), (3, 2), "block.router"),
        r=4,
        rank_pattern={"router.weight": 2},
        target_parameters=["router.weight"],
    )
    assert adapter.weights["block.router"].scale == 1.5


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
@settings(max_examples=100, deadline=None)
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
    "one A, B stacked": ((2, 4), (5, 6), lambda a, e: a, lambda b, e: b[:, e::3]),
    "one B": ((3, 2, 4), (5, 2), lambda a, e: a[e], lambda b, e: b),
    "one B, A stacked": ((6, 4), (5, 2), lambda a, e: a[2 * e : 2 * e + 2], lambda b, e: b),
    "stacked": ((6, 4), (5, 6), lambda a, e: a[2 * e : 2 * e + 2], lambda b, e: b[:, e::3]),
    "one pair": ((2, 4), (5, 2), lambda a, e: a, lambda b, e: b),
    "A apart, B stacked": ((3, 2, 4), (5, 6), lambda a, e: a[e], lambda b, e: b[:, e::3]),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["down_proj", "w2"])
def test_factors_of_all_experts(form: str, name: str) -> None:
    model = Model()
    a_shape, b_shape, own_a, own_b = FORMS[form]
    tensors = pair(a_shape, b_shape, f"{PATH}.{name}")
    a, b = tensors.values()
    found = delta(model, read(model, tensors), "down_proj")
    want = torch.stack([1.5 * own_b(b, e) @ own_a(a, e) for e in range(3)])
    assert torch.allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("halves", ["stacked", "interleaved"])
def test_halves_of_all_experts(halves: str) -> None:
    model = Model(halves=halves)
    tensors = {
        **pair((2, 5), (3, 4, 2), f"{PATH}.gate_proj", seed=1),
        **pair((3, 1, 5), (3, 4, 1), f"{PATH}.up_proj", seed=2),
    }
    gate_a, gate_b, up_a, up_b = tensors.values()
    adapter = read(model, tensors, rank_pattern={"up_proj": 1})
    found = delta(model, adapter, "gate_up_proj")
    gate, up = (
        (found[:, :4], found[:, 4:]) if halves == "stacked" else (found[:, ::2], found[:, 1::2])
    )
    assert torch.allclose(gate, 1.5 * torch.einsum("enr,rk->enk", gate_b, gate_a), atol=1e-5)
    assert torch.allclose(up, 3 * torch.einsum("enr,erk->enk", up_b, up_a), atol=1e-5)


def test_what_an_adapter_names() -> None:
    model = Model(experts=4)
    for tensors, config, names in (
        (pair((8, 4), (5, 8), PATH), {"target_parameters": ["experts.down_proj"]}, ["down_proj"]),
        (pair((2, 4), (5, 2), f"{PATH}.3.w2"), {}, ["down_proj"]),
        (pair((2, 5), (4, 2), f"{PATH}.1.up_proj"), {}, ["gate_up_proj"]),
        (pair((4, 2, 5), (4, 8, 2), f"{PATH}.w13"), {}, ["gate_up_proj"]),
    ):
        found = adapter_target_modules(state_of(tensors, **config), model)
        assert found.modules == tuple(f"{PATH}.{name}" for name in names)
        assert found.rank == 2
        _, sites = build_sites(model, lorafx.LoraConfig(target_modules=found.modules))
        assert [site.path for site in sites] == list(found.modules)


def test_a_target_may_be_the_module_of_experts() -> None:
    model = Model()
    tensors = pair((3, 2, 4), (3, 5, 2), f"{PATH}.down_proj")
    assert set(read(model, tensors, target_modules=["experts"]).weights) == {f"{PATH}.down_proj"}
    with pytest.warns(lorafx.LorafxWarning, match=r"1 of them \(50 %\): block.experts\. "):
        read(
            model,
            pair((2, 5), (3, 2), "block.router"),
            target_modules=["experts"],
            target_parameters=["router.weight"],
        )
