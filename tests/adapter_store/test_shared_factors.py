"""Which siblings of a bank of experts hold the same A: `Bank.alike`, and one A in host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_files import PATH, Model, pair, read
from torch import Tensor

import lorafx
from lorafx.adapter_store.store import AdapterStore
from lorafx.model.bank import Bank
from lorafx.model.sites import Group
from lorafx.passes.attach import allocate_groups
from lorafx.prepare.marking import build_sites

pytestmark = pytest.mark.quick

E, HIDDEN, INNER, R = 3, 5, 4, 2
APART, SHARED = [[0, 1]] * E, [[0, 0]] * E


def both_halves(seed: int) -> dict[str, Tensor]:
    """One pair an expert for gate and up together, as PEFT stacks them."""
    wrapper = f"{PATH}.base_layer"
    tensors = pair((R * E, HIDDEN), (2 * INNER, R * E), wrapper, seed)
    return {**tensors, **pair((R * E, INNER), (HIDDEN, R * E), PATH, seed + 1)}


def a_half_each(shared: bool) -> dict[str, Tensor]:
    """Gate and up of every expert, with A of their own or the same one."""
    tensors = {}
    for expert in range(E):
        for seed, name in enumerate(("gate_proj", "up_proj")):
            own = pair((R, HIDDEN), (INNER, R), f"{PATH}.{expert}.{name}", 0 if shared else seed)
            tensors.update(own)
    return tensors


def banks(model: Model) -> tuple[AdapterStore, Group]:
    config = lorafx.LoraConfig(target_modules=["experts"], max_adapters=2, max_rank=R)
    _, sites = build_sites(model, config)
    groups = allocate_groups(sites, config)
    group = next(g for g in groups if g.sites[0].path.endswith("gate_up_proj"))
    return AdapterStore(groups, 2), group


def of_slot(bank: Bank, slot: int) -> list[list[int]]:
    assert bank.alike is not None
    return bank.alike[slot :: len(bank.alike) // E].tolist()


def test_gate_and_up_of_one_pair_are_alike() -> None:
    """In their adapter's slot, and no longer when another adapter takes it."""
    model = Model()
    store, group = banks(model)
    store.load(replace(read(model, both_halves(0)), name="pair"))
    store.load(replace(read(model, a_half_each(shared=False)), name="halves"))
    store.load(replace(read(model, both_halves(3)), name="other"))
    assert store.acquire(["pair", "halves"]) == [0, 1]
    assert of_slot(group.bank, 0) == SHARED
    assert of_slot(group.bank, 1) == APART
    planes = group.bank.A[::2].unflatten(2, (2, -1))  # of slot 0 of 2
    assert torch.equal(planes[:, :, 0], planes[:, :, 1])  # each sibling holds it all the same
    store.unload("halves")
    assert store.acquire(["other"]) == [1]
    assert of_slot(group.bank, 1) == SHARED
    store.unload("pair")
    store.load(replace(read(model, a_half_each(shared=False)), name="halves"))
    assert store.acquire(["halves"]) == [0]
    assert of_slot(group.bank, 0) == APART
