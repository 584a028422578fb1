"""Packed base weights as a property: values, identities and memory stay, whatever the siblings."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lorafx.config import LoraConfig
from lorafx.errors import CaptureError
from lorafx.model.packing import PackedGroup, PackWatch, pack_weights, repack
from lorafx.passes.attach import allocate_groups
from lorafx.prepare.marking import build_sites

pytestmark = pytest.mark.quick

SIBLINGS = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=2, max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def _model(siblings: list[tuple[int, bool]], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for index, (size, bias) in enumerate(siblings):
        model.add_module(f"p{index}", nn.Linear(5, size, bias=bias, dtype=dtype))
    return model


def _packed(model: nn.Module, room: tuple[int, int] = (0, 0)) -> PackedGroup | None:
    config = LoraConfig(target_modules=[name for name, _ in model.named_children()])
    graph, sites = build_sites(model, config)
    (group,) = allocate_groups(sites, config)
    return pack_weights(graph, group, room=room)


def _stored(model: nn.Module) -> int:
    """Bytes behind the parameters, each storage once."""
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@settings(max_examples=60, deadline=None)
@given(siblings=SIBLINGS, dtype=DTYPES)
def test_packing_keeps_values_objects_and_memory(siblings, dtype) -> None:
    model = _model(siblings, dtype)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    bytes_before = _stored(model)
    packed = _packed(model)
    assert packed is not None
    assert packed.intact
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name])
    rows = [parameter for name, parameter in parameters.items() if name.endswith("weight")]
    assert torch.equal(packed.weight, torch.cat(rows))
    if any(bias for _, bias in siblings):
        parts = [
            before.get(f"p{i}.bias", torch.zeros(size, dtype=dtype))
            for i, (size, _) in enumerate(siblings)
        ]
        assert torch.equal(packed.bias, torch.cat(parts))
    else:
        assert packed.bias is None
    missing = sum(size for size, bias in siblings if not bias)
    padding = missing * dtype.itemsize if packed.bias is not None else 0
    assert _stored(model) == bytes_before + padding


@settings(max_examples=60, deadline=None)
@given(siblings=SIBLINGS, dtype=DTYPES, data=st.data())
def test_what_splits_the_views_is_noticed_and_repaired(siblings, dtype, data) -> None:
    model = _model(siblings, dtype)
    packed = _packed(model)
    assert packed is not None
    names = [name for name, _ in model.named_parameters()]
    split = data.draw(st.sets(st.sampled_from(names), min_size=1))
    written = data.draw(st.sets(st.sampled_from(names)))
    for name, parameter in model.named_parameters():
        if name in split:
            parameter.data = torch.randn_like(parameter)
        if name in written:
            with torch.no_grad():
                parameter.add_(1)
    values = copy.deepcopy(model.state_dict())
    assert not packed.intact
    assert repack([packed]) is None
    assert packed.intact
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
    weights = [values[f"p{i}.weight"] for i in range(len(siblings))]
    assert torch.equal(packed.weight, torch.cat(weights))


@pytest.mark.parametrize("which", range(3))
def test_all_packs_are_watched_at_once(which: int) -> None:
    models = [_model([(3, False), (2, True)], torch.float32) for _ in range(3)]
    packs = [_packed(model) for model in models]
    watch = PackWatch(packs)
    assert watch.intact
    split = models[which].p1
    split.bias.data = torch.ones(2)
    assert not watch.intact
    watch.check()
    assert watch.intact
    assert torch.equal(packs[which].bias, torch.tensor([0.0, 0, 0, 1, 1]))
    split.weight = None  # gone
    assert not watch.intact
    with pytest.raises(CaptureError, match="siblings have changed"):
        watch.check()
    assert PackWatch([]).intact


@settings(max_examples=30, deadline=None)
@given(siblings=SIBLINGS.map(lambda found: found[1:]), dtype=DTYPES, left=st.integers(0, 3))
@example(siblings=[(1, False), (1, False)], dtype=torch.float32, left=0)  # single rows have no gap
def test_room_beside_the_columns_is_nobodys(siblings, dtype, left) -> None:
    """Parameters are what they were, saved and copied as before, and live as long as they do."""
    model = _model(siblings, dtype)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    packed = _packed(model, (left, 4))
    assert packed is not None
    assert packed.intact
    packed.weight[:, :left] = packed.weight[:, -4:] = torch.nan  # what a kernel leaves there
    copied = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    for found in (model.state_dict(), copied.state_dict(), torch.load(saved)):
        assert all(torch.equal(found[name], value) for name, value in before.items())
    model.p0.weight.data = torch.randn_like(before["p0.weight"])
    assert not packed.intact
    assert repack([packed]) is None
    values = copy.deepcopy(model.state_dict())
    storages = {p.untyped_storage().data_ptr() for n, p in parameters.items() if "weight" in n}
    assert len(storages) == len(siblings)
    gone = weakref.ref(packed)
    del packed
    assert gone() is None  # the parameters alone keep the memory now
    noise = [torch.full((64,), torch.nan, dtype=dtype) for _ in range(100)]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    del noise


@settings(max_examples=30, deadline=None)
@given(siblings=SIBLINGS, odd=st.integers(0, 4))
def test_a_group_with_a_parameter_that_cannot_move_is_left_as_it_is(siblings, odd) -> None:
    model = _model(siblings, torch.float32)
    child = model.get_submodule(f"p{odd % len(siblings)}")
    model.tied = child.weight  # the storage has another owner now
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    view = child.weight.data
    other = nn.Linear(5, child.out_features, bias=False)
    other.weight.data = view
    model.other = other
    config = LoraConfig(target_modules=[f"p{i}" for i in range(len(siblings))])
    graph, sites = build_sites(model, config)
    (group,) = allocate_groups(sites, config)
    assert pack_weights(graph, group) is None
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in pointers} == (
        pointers
    )
