"""Methods that replace a part of W, or add to the outputs.

DEFT    W′ = W + Q (s R − Pᵀ W), Q = P, and relu(P) for P on the right; or Q of P = Q U in both
BEFT    b′ = b + β
KaSA    W′ = W without its r smallest singular parts, + s B diag(d) A
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given, Misfit, NotServed
from lorafx.kernels.ops.own_rows import SHIFTED_OUTPUT, Structure


def _deft(given: Given) -> ChangedWeight:
    p = given.take("deft_P", "N", "r")
    kind = given.option("decomposition_method", "relu")
    if kind not in ("relu", "qr"):
        raise NotServed(
            f"{given.place}: decomposition_method = {checks.short(kind)} is none of relu, qr"
        )
    if p.shape[1] > len(p):
        raise Misfit(f"{given.tensors['deft_P'][0]} has shape {tuple(p.shape)}, r is over N")
    q, right = (p, p.relu()) if kind == "relu" else (torch.linalg.qr(p).Q,) * 2
    if given.option("para", False):  # it removes alone
        return ChangedWeight(_replaced, (q, right), len(p))
    alpha, r = given.option("alpha"), given.take("deft_R", "r", "K")
    scaled = r * alpha / len(r) if alpha else r
    return ChangedWeight(_replaced, (q, right, scaled), len(p), r.shape[1])


def _replaced(weight: Tensor, q: Tensor, right: Tensor, injected: Tensor | None = None) -> Tensor:
    removed = right.mT @ weight
    return weight + q @ (-removed if injected is None else injected - removed)


def _beft(given: Given) -> ChangedWeight:
    bias = given.take("beft_bias", "1", "N")
    if len(bias) != 1:
        raise Misfit(f"{given.tensors['beft_bias'][0]} has {len(bias)} rows, it needs 1")
    return ChangedWeight.structured(Structure(SHIFTED_OUTPUT, 1), bias, bias.shape[1])


def _kasa(given: Given) -> ChangedWeight:
    a, b, diagonal = (
        given.take("lora_A", "r", "K"),
        given.take("lora_B", "N", "r"),
        given.take("lora_diag", "r"),
    )
    if len(a) >= min(len(b), a.shape[1]):
        raise Misfit(
            f"{given.place} has rank {len(a)}, and of so many singular values of W "
            f"({len(b)}, {a.shape[1]}) none would be left"
        )
    scale = given.scale(len(a))
    assert scale is not None
    scaled = scale * diagonal[:, None] * a
    return ChangedWeight(_without_smallest, (scaled, b), len(b), a.shape[1])


def _without_smallest(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    first = len(s) - len(a)
    return weight - (u[:, first:] * s[first:]) @ v[first:] + b @ a


DEFT = AdapterMethod(
    name="DEFT",
    peft_type="DEFT",
    marks="deft_[PR]",
    read=_deft,
    fields={
        "decomposition_method": checks.anything,
        "para": checks.flag,
        "alpha": checks.optional(checks.alpha),
    },
    training=frozenset({"init_scale", "deft_dropout", "init_weights"}),
    form="own weight",
    rank="—",
)
BEFT = AdapterMethod(
    name="BEFT",
    peft_type="BEFT",
    marks="beft_bias",
    read=_beft,
    training=frozenset({"init_weights"}),
    form="own weight",
    rank="—",
)
KASA = AdapterMethod(
    name="KaSA",
    peft_type="LORA",
    marks="lora_[AB]|lora_diag",
    read=_kasa,
    switch="kasa_config",
    fields={"kasa_config": checks.anything},
    form="own weight",
    rank="—",
)
