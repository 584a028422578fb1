"""Names of a packed projection without declared slices: the rows of the factors partition these."""

from __future__ import annotations

from itertools import pairwise

import expert_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorafx
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.errors import CheckpointError
from lorafx.layers import MergedColumnParallelLinear
from lorafx.model.packed_names import spans
from lorafx.runtime.marking import build_sites

pytestmark = [pytest.mark.usefixtures("fixed_sizes"), pytest.mark.quick]

K = 4
NAMES = ["a", "b", "c", "d"]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Slices, and where the parts of them begin and end that fewer names have."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=3, max_size=6))
    most = min(len(NAMES) - 1, len(sizes) - 2)
    inner = draw(st.sets(st.integers(1, len(sizes) - 1), min_size=1, max_size=most))
    return sizes, [0, *sorted(inner), len(sizes)]


@settings(deadline=None)
@given(cuts(), st.data())
def test_the_names_of_one_adapter_partition_the_slices(
    cut: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    """What is accepted is where the rows were taken from; what leaves a hole or overlaps is not."""
    sizes, ends = cut
    names = NAMES[: len(ends) - 1]
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
