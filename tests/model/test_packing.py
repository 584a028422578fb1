"""Packed base weights as a property: values, identities and memory stay, whatever the siblings."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorafx.config import LoraConfig
from lorafx.model.packing import PackedGroup, pack_weights, repack
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


def _packed(model: nn.Module) -> PackedGroup | None:
    config = LoraConfig(target_modules=[name for name, _ in model.named_children()])
    graph, sites = build_sites(model, config)
    (group,) = allocate_groups(sites, config)
    return pack_weights(graph, group)


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
