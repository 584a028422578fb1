"""Reading adapters of routed experts, against PEFT's formula written out index by index.

stored (E, d1, d2), PEFT takes d2 as the input unless `is_transposed` (before 0.19: d1)
ΔW[e] [o, i] = s · Σ_j B[o, j·E + e] A[e·r + j, i]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import AdapterState
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import Adapter, adapter_target_modules, read_adapter
from lorafx.errors import CapacityError, CheckpointError
from lorafx.passes.select import build_sites

PATH = "block.experts"


class Experts(nn.Module):
    """Two 3-D parameters, stored and named as asked for."""

    def __init__(
        self,
        experts: int = 3,
        hidden: int = 5,
        inner: int = 4,
        *,
        transposed: bool = False,
        declared: bool = True,
        halves: str = "stacked",
        names: tuple[str, str] = ("gate_up_proj", "down_proj"),
        down_first: bool = False,
    ) -> None:
        super().__init__()
        if declared:
            self.is_transposed = transposed
        self.is_concatenated = halves == "stacked"
        width = inner if halves == "" else 2 * inner
        sizes = [(names[0], (width, hidden)), (names[1], (hidden, inner))]
        for name, size in reversed(sizes) if down_first else sizes:
            shape = size[::-1] if transposed else size
            self.register_parameter(name, nn.Parameter(torch.zeros(experts, *shape)))


class Model(nn.Module):
    """Experts with a router beside them."""

    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.router = nn.Module()
        self.block.router.weight = nn.Parameter(torch.zeros(3, 5))
        self.block.experts = Experts(**form)


def read(
    model: nn.Module, tensors: dict[str, Tensor], max_rank: int | None = None, **config: Any
) -> Adapter:
    state = _state(tensors, **config)
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["experts", "router"]))
    return read_adapter(state, "a", sites, model=model, max_rank=max_rank)


def _state(tensors: dict[str, Tensor], **config: Any) -> AdapterState:
    settings = {"r": 2, "lora_alpha": 3, "peft_version": "0.21.2", **config}
    named = {f"base_model.model.{key}.weight": value for key, value in tensors.items()}
    return AdapterState(PeftConfig.read(settings), named, "memory")


def delta(model: nn.Module, adapter: Adapter, name: str) -> Tensor:
    """What the read factors add to the parameter, as it is stored."""
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["experts"]))
    site = next(s for s in sites if s.path == f"{PATH}.{name}")
    rows = []
    for index, part in enumerate(site.parts):
        made = torch.zeros(site.experts, part.out_features, part.in_features)
        weights = adapter.weights.get(site.part_path(index))
        if weights is not None:
            for e in range(site.experts):
                r = int(weights.ranks[e])
                made[e] = float(weights.scale[e]) * weights.B[e, :, :r] @ weights.A[e, :r]
        rows.append(made)
    whole = torch.cat(rows, 1)
    return whole.mT if site.eligible.transposed else whole


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


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(a: tuple[int, ...], b: tuple[int, ...], path: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{path}.lora_A": noise(*a, seed=seed), f"{path}.lora_B": noise(*b, seed=seed + 1)}


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
    with pytest.raises(CheckpointError, match="target_parameters which of them was trained"):
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


def test_the_up_half_has_its_own_a() -> None:
    """A peer read the gate's A for both."""
    model = Model()
    tensors = {
        **pair((2, 5), (4, 2), f"{PATH}.0.gate_proj", seed=1),
        **pair((2, 5), (4, 2), f"{PATH}.0.up_proj", seed=2),
    }
    adapter = read(model, tensors)
    gate, up = (adapter.weights[f"{PATH}.gate_up_proj[{i}]"] for i in range(2))
    assert torch.equal(gate.A[0], tensors[f"{PATH}.0.gate_proj.lora_A"])
    assert torch.equal(up.A[0], tensors[f"{PATH}.0.up_proj.lora_A"])
    assert gate.ranks.tolist() == up.ranks.tolist() == [2, 0, 0]


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


def test_one_a_for_all_experts_and_a_b_for_some() -> None:
    model = Model()
    tensors = {
        f"{PATH}.w13.lora_A": noise(2, 5),
        f"{PATH}.0.w13.lora_B": noise(8, 2, seed=1),
        f"{PATH}.2.gate_up_proj.lora_B": noise(8, 2, seed=2),
    }
    a, first, third = tensors.values()
    found = delta(model, read(model, tensors), "gate_up_proj")
    want = torch.stack([1.5 * first @ a, torch.zeros(8, 5), 1.5 * third @ a])
    assert torch.allclose(found, want, atol=1e-5)


BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "expert out of range": (
        pair((2, 5), (4, 2), f"{PATH}.7.gate_proj"),
        {},
        r"has 3 experts here \(0 … 2\), and the adapter has factors for 7",
    ),
    "another number of experts": (
        {**pair((16, 5), (8, 16), f"{PATH}.base_layer"), **pair((16, 4), (5, 16), PATH)},
        {},
        r"for the 3 experts of this model; 16 is not a multiple",
    ),
    "another number, divisible": (
        pair((12, 4), (5, 12), PATH),
        {},
        r"12 rows, which at the rank 2 of adapter_config.json are those of 6 experts",
    ),
    "another number, apart": (
        pair((4, 2, 4), (4, 5, 2), f"{PATH}.down_proj"),
        {},
        "do not fit 3 experts",
    ),
    "neither parameter": (pair((6, 7), (9, 6), PATH), {}, "fit neither gate_up_proj and down_proj"),
    "no B": ({f"{PATH}.0.w2.lora_A": noise(2, 4)}, {}, "has no factor B"),
    "no A": ({f"{PATH}.lora_B": noise(5, 6)}, {}, "has no factor A"),
    "NaN": (
        {f"{PATH}.0.w2.lora_A": noise(2, 4) / 0, f"{PATH}.0.w2.lora_B": noise(5, 2)},
        {},
        "NaN or infinite",
    ),
    "rank unlike the configuration": (
        pair((3, 4), (5, 3), f"{PATH}.0.w2"),
        {},
        "has rank 3, adapter_config.json says 2",
    ),
    "wrong size": (pair((2, 9), (5, 2), f"{PATH}.1.w2"), {}, r"needs \(r, 4\)"),
    "a left over key": (
        {**pair((2, 4), (5, 2), f"{PATH}.0.w2"), f"{PATH}.0.w2.lora_C": noise(2)},
        {},
        "is not a LoRA factor and names nothing",
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
    "all experts and one": (
        {**pair((3, 2, 4), (3, 5, 2), f"{PATH}.w2"), **pair((2, 4), (5, 2), f"{PATH}.1.w2")},
        {},
        "both have factors for the same columns",
    ),
    "one A twice": (
        {**pair((2, 4), (5, 2), f"{PATH}.1.w2"), f"{PATH}.w2.lora_A": noise(2, 4)},
        {},
        "is for all experts, and .* for one of them",
    ),
    "one pair or stacked": (
        pair((6, 4), (5, 6), f"{PATH}.down_proj"),
        {"r": 5},
        "rank 6 for all experts or",
    ),
    "targeted and absent": (
        pair((6, 4), (5, 6), PATH),
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"]},
        r"targets block.router, block.experts.gate_up_proj, but the file has no weights",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str) -> None:
    tensors, config, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        read(Model(), tensors, **config)


def test_all_problems_at_once() -> None:
    tensors = {
        key: t for case in ("expert out of range", "no B") for key, t in BAD[case][0].items()
    }
    tensors.update(pair((2, 9), (5, 2), f"{PATH}.1.w2"))
    with pytest.raises(CheckpointError) as caught:
        read(Model(), tensors)
    assert str(caught.value).count("\n  - ") == 3


def test_a_rank_over_what_the_banks_hold() -> None:
    tensors = {
        **pair((2, 5), (4, 2), f"{PATH}.0.gate_proj"),
        **pair((2, 5), (4, 2), f"{PATH}.0.up_proj", seed=2),
    }
    interleaved = Model(halves="interleaved")
    assert read(interleaved, tensors, max_rank=2).rank == 2
    with pytest.raises(CapacityError, match="rank 2 is over max_rank = 1"):
        read(interleaved, tensors, max_rank=1)


def test_w13_of_interleaved_columns_is_refused() -> None:
    with pytest.raises(CheckpointError, match="w13 may mean them so or one after the other"):
        read(Model(halves="interleaved"), pair((2, 5), (8, 2), f"{PATH}.0.w13"))


def test_a_projection_that_the_experts_do_not_have() -> None:
    with pytest.raises(CheckpointError, match="the experts here have no gate_proj"):
        read(Model(halves=""), pair((2, 5), (4, 2), f"{PATH}.0.gate_proj"))


def test_experts_that_were_not_selected() -> None:
    model = Model()
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["down_proj"]))
    for tensors in (pair((2, 5), (4, 2), f"{PATH}.0.w1"), pair((6, 5), (8, 6), PATH)):
        with pytest.raises(CheckpointError, match=r"gate_up_proj exists but was not selected"):
            read_adapter(_state(tensors), "a", sites, model=model)


def test_what_an_adapter_names() -> None:
    model = Model(experts=4)
    for tensors, config, names in (
        (pair((8, 4), (5, 8), PATH), {"target_parameters": ["experts.down_proj"]}, ["down_proj"]),
        (pair((2, 4), (5, 2), f"{PATH}.3.w2"), {}, ["down_proj"]),
        (pair((2, 5), (4, 2), f"{PATH}.1.up_proj"), {}, ["gate_up_proj"]),
        (pair((4, 2, 5), (4, 8, 2), f"{PATH}.w13"), {}, ["gate_up_proj"]),
    ):
        found = adapter_target_modules(_state(tensors, **config), model)
        assert found.modules == tuple(f"{PATH}.{name}" for name in names)
        assert found.rank == 2
        _, sites = build_sites(model, lorafx.LoraConfig(target_modules=found.modules))
        assert [site.path for site in sites] == list(found.modules)


def test_experts_that_are_modules_are_linears() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList(
        nn.ModuleDict({"gate_proj": nn.Linear(5, 4), "down_proj": nn.Linear(4, 5)})
        for _ in range(2)
    )
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["gate_proj", "down_proj"]))
    tensors = pair((2, 5), (4, 2), "experts.1.gate_proj")
    adapter = read_adapter(_state(tensors), "a", sites, model=model)
    assert set(adapter.weights) == {"experts.1.gate_proj"}
    assert adapter.weights["experts.1.gate_proj"].A.dim() == 2
