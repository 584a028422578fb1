"""Groups of small banks, adapters for them, and what their slots hold."""

from __future__ import annotations

import torch
from torch import nn

from lorafx.adapter_store.stored import Adapter, LoraWeights
from lorafx.model.bank import Bank
from lorafx.model.sites import Group, Site
from lorafx.registry import lookup

SLOTS, RANK = 3, 4
SIZES = {"q": (5, 7), "k": (5, 2), "embed": (6, 3), "down": (8, 5)}


def make_groups(
    dtype=torch.float32, slots: int = SLOTS, rank: int = RANK, slot_rank: int | None = None
) -> list[Group]:
    """q and k in one bank, an embedding and a lone linear in banks of their own."""
    cpu = torch.device("cpu")
    sites = {}
    for path, (k, n) in SIZES.items():
        module = nn.Embedding(k, n) if path == "embed" else nn.Linear(k, n)
        sites[path] = Site(path, (), module, lookup(module), k, n, dtype, cpu)
    groups = []
    for members in (("q", "k"), ("embed",), ("down",)):
        outs = tuple(SIZES[m][1] for m in members)
        bank = Bank.allocate(
            kind=sites[members[0]].eligible.kind,
            slots=slots,
            rank=rank,
            slot_rank=slot_rank,
            in_features=SIZES[members[0]][0],
            out_features=outs,
            dtype=dtype,
            device=cpu,
        )
        offsets = tuple(sum(outs[:i]) for i in range(len(outs)))
        groups.append(Group(tuple(sites[m] for m in members), offsets, bank))
    return groups


def make_adapter(name: str, ranks: dict[str, int], seed: int = 0) -> Adapter:
    made = torch.Generator().manual_seed(seed)
    weights = {
        path: LoraWeights(
            torch.randn(rank, SIZES[path][0], generator=made),
            torch.randn(SIZES[path][1], rank, generator=made),
            0.5 + seed,
        )
        for path, rank in ranks.items()
    }
    return Adapter(name, weights, max(ranks.values()), "memory")


def held(groups: list[Group], slot: int) -> dict[str, LoraWeights]:
    """What the banks say about `slot`, read only as far as `ranks` allows."""
    found = {}
    for group in groups:
        bank = group.bank
        for i, site in enumerate(group.sites):
            r = int(bank.ranks[slot, i])
            if r == 0:
                continue
            if site.eligible.kind == "embedding":
                a = bank.A[slot, :, :r].t()
            else:
                a = bank.A[slot, :r].unflatten(1, (bank.ranks.shape[1], -1))[:, i]
            columns = slice(group.offsets[i], group.offsets[i] + site.out_features)
            b = bank.B[slot, :r, columns].t()
            found[site.path] = LoraWeights(a, b, float(bank.scales[slot, i]))
    return found


def same(found: dict[str, LoraWeights], adapter: Adapter) -> bool:
    return found.keys() == adapter.weights.keys() and all(
        torch.equal(found[p].A, w.A) and torch.equal(found[p].B, w.B) and found[p].scale == w.scale
        for p, w in adapter.weights.items()
    )
