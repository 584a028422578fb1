"""Packed projections, both ways: the base's packing and the adapter's need not be the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import expert_files
import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed
from hand_made import factors, hand_case, merged, random_factors, save
from hypothesis import given
from hypothesis import strategies as st
from packed_models import MAPPING, PACKED_AS, packed_factors, twins
from slowly import few
from torch import nn

import lorafx
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.errors import CheckpointError, ConfigError, TargetError
from lorafx.layers import MergedColumnParallelLinear
from lorafx.model.packed_names import spans
from lorafx.runtime.marking import build_sites

LAYERS = range(2)
#: Adapters by what they touch; "part" leaves slices out.
TARGETS = {
    "all": [*PACKED_AS, "o_proj", "down_proj"],
    "part": ["q_proj", "v_proj", "up_proj", "in_proj_z"],
    "values": ["v_proj", "in_proj_qkv"],
}
NAMES = ["all", None, "part", "values", "all"]
IDS = {"input_ids": torch.randint(0, 20, (5, 7), generator=torch.Generator().manual_seed(1))}


def paths(names: list[str]) -> list[str]:
    return [f"layers.{i}.{name}" for i in LAYERS for name in names]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapters trained on the model whose projections are apart."""
    apart, _ = twins()
    folder = tmp_path_factory.mktemp("apart")
    return hand_case(apart, folder, **{name: paths(own) for name, own in TARGETS.items()})


def compiled(model: nn.Module, case: Case, config: Any = None, **options: Any) -> Any:
    config = config or lorafx.LoraConfig(target_modules=TARGETS["all"], max_adapters=4)
    options = {**REFERENCE, **options}
    return lorafx.compile(model, config, adapters=case.folders, options=options)


def test_adapters_of_single_projections_on_a_packed_base(case: Case) -> None:
    cm = compiled(twins()[1], case)
    assert sorted({site.path.rpartition(".")[2] for site in cm.sites}) == sorted(
        [*MAPPING, "o_proj", "down_proj"]
    )
    check_mixed(cm, case, NAMES, IDS)
    check_mixed(cm, case, ["values", "values", "part", None], {"input_ids": IDS["input_ids"][:4]})
    graphs = cm.recompiles
    check_mixed(cm, case, ["part", "all", None, "values", None], IDS)
    assert cm.recompiles == graphs
    assert "[q_proj 16, k_proj 8, v_proj 8]" in str(cm.explain())


@pytest.mark.parametrize("name", few(MAPPING, "in_proj_qkvz"))
def test_packed_adapters(name: str, tmp_path: Path) -> None:
    """One A and a B over all slices: on the packed base, and split over a base that is not."""
    apart, packed = twins()
    own, expected = packed_factors(1, name, rank=3, seed=5)
    others = factors(apart, paths(["o_proj", "v_proj"]), rank=2, seed=6)
    folders = {"packed": save(packed, tmp_path / "p", own)}
    folders["other"] = save(apart, tmp_path / "o", others)
    both = {"packed": merged(apart, expected), "other": merged(apart, others)}
    case = Case(apart, folders, both)
    config = lorafx.LoraConfig(
        target_modules=[name, "o_proj", "v_proj"], max_adapters=2, packed_modules=MAPPING
    )
    names = ["packed", "other", None, "packed", "other"]
    for model in (packed, case.model()):
        check_mixed(compiled(model, case, config), case, names, IDS)


# --- one forward path ---
def test_the_packed_weight_is_never_unpacked(case: Case, tmp_path: Path) -> None:
    """With LoRA each packed projection is one node over the whole weight; without, the base's."""
    model = twins()[1]
    weights = {n: p for n, p in model.named_parameters() if "_proj" in n}
    before = {n: (p.shape, p.stride()) for n, p in weights.items()}
    cm = compiled(model, case, dump=str(tmp_path))
    check_mixed(cm, case, NAMES, IDS)
    after = {n: (p.shape, p.stride()) for n, p in model.named_parameters()}
    packed = [n for n in before if n.split(".")[-2] in MAPPING]
    assert packed
    assert all(before[n] == after[n] for n in packed)
    (final,) = tmp_path.glob("*lora*/*lower.py")
    text = final.read_text()
    fused = [line for line in text.splitlines() if "lorafx.fused_linear.default(" in line]
    assert len(fused) == 5 * len(LAYERS)  # qkv, o, mixer, gate_up, down
    assert sum("[0, 1, 2], [0, 16, 24], [16, 8, 8]" in line for line in fused) == len(LAYERS)
    assert not [line for line in text.splitlines() if "aten.mm" in line and "proj" in line]


# --- names ---
def test_parts_that_were_not_asked_for_take_no_factors(case: Case) -> None:
    config = lorafx.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "in_proj_z"])
    cm = lorafx.compile(twins()[1], config, options=REFERENCE)
    cm.load_adapter(case.folders["part"], "part")
    with pytest.raises(CheckpointError, match=r"layers\.0\.k_proj exists but was not selected"):
        cm.load_adapter(case.folders["all"], "all")
    assert cm.adapters == ("part",)
    check_mixed(cm, case, ["part", None], {"input_ids": IDS["input_ids"][:2]})


def test_targets_name_packed_modules_and_members() -> None:
    apart, packed = twins()
    packed.packed_modules_mapping = {}

    def named(model: nn.Module, targets: Any, mapping: Any = MAPPING) -> set[str]:
        config = lorafx.LoraConfig(target_modules=targets, packed_modules=mapping)
        return {site.path for site in build_sites(model, config)[1]}

    assert named(packed, ["q_proj"]) == set(paths(["qkv_proj"]))
    assert named(packed, ["qkv_proj"]) == set(paths(["qkv_proj"]))
    assert named(packed, ["qkv_proj", "q_proj"]) == set(paths(["qkv_proj"]))
    assert named(apart, ["qkv_proj"]) == set(paths(["q_proj", "k_proj", "v_proj"]))
    assert named(apart, ["k_proj"]) == set(paths(["k_proj"]))
    assert named(packed, ["in_proj_z"]) == set(paths(["in_proj_qkvz"]))
    assert named(packed, r"layers\.0\.v_proj") == {"layers.0.qkv_proj"}
    with pytest.raises(TargetError):
        named(packed, ["q_proj"], None)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (["q_proj"], "must map packed names"),
        ({"qkv_proj": "q_proj"}, "must be a list of names"),
        ({"qkv_proj": ["q_proj", "q_proj"]}, "distinct names"),
        ({"qkv_proj": {"q_proj": (0, 2), "k_proj": 1}}, "consecutive slices"),
        ({"qkv_proj": {"q_proj": (0, 1), "k_proj": 1}}, "slices of its own"),
        ({"qkv_prjo": ["q_prjo"]}, r"'qkv_prjo' matches no module, neither.*nearest: qkv_proj"),
        ({"qkv_proj": ["q", "k", "v", "w"]}, r"3 output slices for the 4 names q, k, v, w"),
        ({"qkv_proj": {"q_proj": (2, 3)}}, "q_proj is declared to be slice 3"),
    ],
)
def test_declarations_that_cannot_be(packed: Any, words: str) -> None:
    model = twins()[1]
    config = lorafx.LoraConfig(target_modules=["qkv_proj"], packed_modules=packed)
    with pytest.raises(ConfigError, match=words):
        lorafx.compile(model, config, options=REFERENCE)


# --- B that cannot be split ---
@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("qkv_proj", 40, r"40 rows cannot be split .* q_proj 16, k_proj 8, v_proj 8, 32 rows"),
        ("k_proj", 9, r"has shape \(9, 2\), layers\.0\.k_proj needs \(8, r = 2\)"),
        ("in_proj_qkv", 20, r"layers\.0\.in_proj_qkv needs \(22, r = 2\)"),
    ],
)
def test_rows_that_fit_no_split(name: str, rows: int, words: str, tmp_path: Path) -> None:
    config = lorafx.LoraConfig(target_modules="all-linear")
    cm = lorafx.compile(twins()[1], config, options=REFERENCE)
    folder = random_factors(tmp_path, f"layers.0.{name}", rows)
    with pytest.raises(ValueError, match=words):
        cm.load_adapter(folder, "wrong")
    assert cm.adapters == ()


K = 4
PARTS = ["a", "b", "c", "d"]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Slices, and where the parts of them begin and end that fewer names have."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=3, max_size=6))
    most = min(len(PARTS) - 1, len(sizes) - 2)
    inner = draw(st.sets(st.integers(1, len(sizes) - 1), min_size=1, max_size=most))
    return sizes, [0, *sorted(inner), len(sizes)]


@pytest.mark.quick
@given(cuts(), st.data())
def test_the_names_of_one_adapter_partition_the_slices(
    cut: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    """What is accepted is where the rows were taken from; what leaves a hole or overlaps is not."""
    sizes, ends = cut
    names = PARTS[: len(ends) - 1]
    starts = dict(zip(names, pairwise(ends), strict=True))
    true = {name: sum(sizes[start:end]) for name, (start, end) in starts.items()}
    changed = {name: data.draw(st.integers(1, sum(sizes))) for name in names}
    rows = data.draw(st.sampled_from([true, true, changed]))
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    own = {name: rows[name] for name in chosen}
    found = dict(zip(names, spans(sizes, [own.get(name) for name in names]), strict=True))
    if any(len(found[name]) != 1 for name in chosen):
        with pytest.raises(CheckpointError, match="cannot be split over the slices"):
            read(sizes, names, own)
        return
    adapter = read(sizes, names, own)
    covered = [i for i in range(len(sizes)) if f"mixer[{i}]" in adapter.weights]
    assert sum(sizes[i] for i in covered) == sum(rows[name] for name in chosen)
    if len(chosen) == len(names):
        assert covered == list(range(len(sizes)))
    if rows is true:
        assert covered == [
            i for i in range(len(sizes)) if any(i in range(*starts[name]) for name in chosen)
        ]


def read(sizes: list[int], names: list[str], rows: dict[str, int], rank: int = 2) -> Adapter:
    model = nn.Module()
    model.mixer = MergedColumnParallelLinear(K, sizes, bias=False)
    model.packed_modules_mapping = {"mixer": names}
    tensors = {}
    for name, count in rows.items():
        tensors[f"{name}.lora_A"] = torch.randn(rank, K)
        tensors[f"{name}.lora_B"] = torch.randn(count, rank)
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["mixer"]))
    return read_adapter(expert_files.state_of(tensors), "x", sites, model=model)
