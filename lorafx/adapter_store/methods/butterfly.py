"""Orthogonal matrices of small blocks, in stages whose blocks meet other rows.

BOFT       W′ᵀ = s ∘ M Wᵀ of PEFT, M = Mₘ … M₁, Mᵢ = Pᵢ diag(blocks) Pᵢᵀ
Diag-OFT   W′ = s ∘ diag(blocks) W of LyCORIS, whose α bounds the generators' norm by α N
B-OFT      W′ = s ∘ Mₘ … M₁ W of LyCORIS, with other permutations than PEFT's

Stage i takes the rows of a block in pieces from two halves of 2ⁱ blocks: pieces of half a block in
PEFT, single rows in LyCORIS.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given
from lorafx.adapter_store.methods.turned import cayley
from lorafx.adapter_store.problems import Problem


def _boft(given: Given) -> ChangedWeight:
    r = given.take("boft_R", "stages", "blocks", "size", "size")
    given.sizes["K"] = _rows_of(given, "boft_R", r)
    return ChangedWeight(_boft_weight, (r, given.take("boft_s", "N", "1")))


def _boft_weight(weight: Tensor, r: Tensor, s: Tensor) -> Tensor:
    turns = cayley((r - r.mT) / 2)
    return _turned_rows(weight.mT, turns, -(-r.shape[-1] // 2)).mT * s


def _lycoris(given: Given) -> ChangedWeight:
    stages = ("stages",) if given.tensors["oft_blocks"][1].dim() == 4 else ()
    r = given.take("oft_blocks", *stages, "blocks", "size", "size")
    outputs = given.sizes["N"] = _rows_of(given, "oft_blocks", r)
    alpha = given.number("alpha")
    if alpha is None:
        raise Problem(
            f"{given.place} has no alpha, LyCORIS's constraint of oft_blocks; write it, 0 for none"
        )
    rescale = (given.take("rescale", "N", "1"),) if "rescale" in given else ()
    limit = alpha * outputs if alpha > 0 else math.inf
    return ChangedWeight(partial(_lycoris_weight, limit=limit), (r, *rescale))


def _lycoris_weight(
    weight: Tensor, r: Tensor, rescale: Tensor | None = None, *, limit: float
) -> Tensor:
    q = r - r.mT
    q = q * (limit / (q.norm() + 1e-8)).clamp(max=1)
    if r.dim() == 3:
        turned = _turned_rows(weight, cayley(q)[None], r.shape[-1])
    else:
        turned = _turned_rows(weight, cayley(-q), 1)
    return turned if rescale is None else turned * rescale


def _rows_of(given: Given, leaf: str, r: Tensor) -> int:
    """How many rows blocks ([stages], blocks, size, size) turn."""
    stages = len(r) if r.dim() == 4 else 1
    count, size = r.shape[-3], r.shape[-1]
    if stages > 1 and (size % 2 or count % (1 << (stages - 1))):
        raise Problem(
            f"{given.key(leaf)} has shape {tuple(r.shape)}: {count} blocks of {size} are no "
            f"butterfly of {stages} stages"
        )
    return count * size


def _turned_rows(rows: Tensor, stages: Tensor, piece: int) -> Tensor:
    """`rows` turned by each of `stages` (blocks, size, size), `piece` rows of a half at a time."""
    size = stages.shape[-1]
    for i, blocks in enumerate(stages):
        order, width = torch.arange(len(rows), device=rows.device), size << i
        if width > 2 * piece:
            halves = order.view(-1, 2, width // (2 * piece), piece)
            order = halves.transpose(1, 2).flatten()
        turned = blocks @ rows[order].unflatten(0, (-1, size))
        rows = turned.flatten(0, 1)[order.argsort()]
    return rows


BOFT = AdapterMethod(
    name="BOFT",
    peft_type="BOFT",
    marks="boft_[Rs]",
    read=_boft,
    training=frozenset(
        {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}
        | {"init_weights"}
    ),
    form="own weight",
)
LYCORIS_OFT = AdapterMethod(
    name="Diag-OFT, BOFT of LyCORIS",
    peft_type=None,
    marks="oft_blocks",
    leaves="rescale",
    read=_lycoris,
    form="own weight",
    lycoris=True,
)
