"""Methods that replace a part of W, or add to the outputs.

DEFT    W′ = W + Q (s R − Pᵀ W), Q = P, and relu(P) for P on the right; or Q of P = Q U in both
BEFT    b′ = b + β
KaSA    W′ = W without its r smallest singular parts, + s B diag(d) A
OSF     W′ = W without its m smallest singular parts, + U diag(S) V of m
FRoD    W′ = U (S + diag(l)) Vᵀ of a V that modules share, where W = U diag(norms) Vᵀ, and sparse S
PEANuT  W′ = W + s (net(Wᵀ) Bᵀ)ᵀ, of encoders and decoders (r, r) with an activation between them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import SAVE_PROJECTION, AdapterMethod, Given
from lorafx.adapter_store.problems import Problem
from lorafx.kernels.ops.own_rows import SHIFTED_OUTPUT, Structure


def _deft(given: Given) -> ChangedWeight:
    p = given.take("deft_P", "N", "r")
    kind = given.choice("decomposition_method", "relu", ("relu", "qr"))
    if p.shape[1] > len(p):
        raise Problem(f"{given.key('deft_P')} has shape {tuple(p.shape)}, r is over N")
    q, right = (p, p.relu()) if kind == "relu" else (torch.linalg.qr(p).Q,) * 2
    if given.option("para", False):  # it removes alone
        return ChangedWeight(_replaced, (q, right))
    alpha, r = given.option("alpha"), given.take("deft_R", "r", "K")
    scaled = r * (alpha / len(r)) if alpha else r
    return ChangedWeight(_replaced, (q, right, scaled))


def _replaced(weight: Tensor, q: Tensor, right: Tensor, injected: Tensor | None = None) -> Tensor:
    removed = right.mT @ weight
    return weight + q @ (-removed if injected is None else injected - removed)


def _beft(given: Given) -> ChangedWeight:
    bias = given.take("beft_bias", "1", "N")
    return ChangedWeight.structured(Structure(SHIFTED_OUTPUT, 1), bias)


def _kasa(given: Given) -> ChangedWeight:
    (a, b), diagonal = given.pair("lora"), given.take("lora_diag", "r")
    if len(a) >= min(len(b), a.shape[1]):
        raise Problem(
            f"{given.place} has rank {len(a)}, and of so many singular values of W "
            f"({len(b)}, {a.shape[1]}) none would be left"
        )
    scale = given.known_scale(len(a))
    return ChangedWeight(_without_smallest, (scale * diagonal[:, None] * a, b))


def _osf(given: Given) -> ChangedWeight:
    u, s, v = (
        given.take("osf_svd_params.U_low", "N", "m"),
        given.take("osf_svd_params.S_low", "m"),
        given.take("osf_svd_params.V_low", "m", "K"),
    )
    if len(s) > min(len(u), v.shape[1]):
        raise Problem(f"{given.place} has {len(s)} singular values of W ({len(u)}, {v.shape[1]})")
    return ChangedWeight(_without_smallest, (s[:, None] * v, u))


def _without_smallest(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    first = len(s) - len(a)
    return weight - (u[:, first:] * s[first:]) @ v[first:] + b @ a


def _frod(given: Given) -> ChangedWeight:
    category = _category(given.path.split("."))
    v, leaf = given.take(f"frod_V.{category}", "K", "K"), f"frod_s_indices.{category}"
    indices = given.indices(leaf, "2", "entries", below=len(v), empty=True)
    values = given.take("frod_lambda_s_values", "entries", empty=True)
    diagonal = given.take("frod_lambda_l", "K")
    return ChangedWeight(_rebuilt, (v, indices, values, diagonal))


def _category(path: list[str]) -> str:
    """PEFT's name of the modules that share V: of the last two parts, but no index."""
    if path[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return path[-1] if len(path) < 2 or path[-2].isdigit() else "_".join(path[-2:])


def _rebuilt(
    weight: Tensor, v: Tensor, indices: Tensor, values: Tensor, diagonal: Tensor
) -> Tensor:
    v, wide, middle = v.double(), weight.double(), torch.diag(diagonal.double())
    try:
        u = torch.linalg.solve(v, wide.mT).mT
    except torch.linalg.LinAlgError:
        u = wide @ torch.linalg.pinv(v, rtol=1e-6).mT
    norms = u.norm(dim=0)
    u = torch.where(norms > 1e-12, u / norms, 0)
    middle = middle.index_put(tuple(indices), values.double(), accumulate=True)
    return (u @ middle @ v.mT).to(weight.dtype)


#: Of transformers' names of activations those that are functions of torch.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **{"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid},
    **{"silu": F.silu, "swish": F.silu},
}


def _peanut(given: Given) -> ChangedWeight:
    name, depth = given.choice("act_fn", "relu", _ACTIVATIONS), given.option("depth", 0)
    if depth > len(given.tensors):
        raise Problem(f"{given.place} has {len(given.tensors)} tensors, and depth = {depth}")
    ends = ("peanut_A", *(f"peanut_{c}coders.{i}" for c in ("en", "de") for i in range(depth)))
    first, *hidden = (given.take(e, "r", "r" if i else "N") for i, e in enumerate(ends))
    last = float(given.option("scaling", 1.0)) * given.take("peanut_B", "N", "r")
    return ChangedWeight(partial(_with_net, activation=name), (first, *hidden, last))


def _with_net(weight: Tensor, first: Tensor, *others: Tensor, activation: str) -> Tensor:
    *hidden, last = others
    act, half = _ACTIVATIONS[activation], len(hidden) // 2
    columns, kept = act(weight.mT @ first.mT), []
    for encoder in hidden[:half]:
        kept.append(columns)
        columns = act(columns @ encoder.mT)
    for decoder in hidden[half:]:
        columns = act(columns @ decoder.mT) + kept.pop()
    return weight + last @ columns.mT


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
)
BEFT = AdapterMethod(
    name="BEFT",
    peft_type="BEFT",
    marks="beft_bias",
    read=_beft,
    training=frozenset({"init_weights"}),
    form="bias",
)
KASA = AdapterMethod(
    name="KaSA",
    peft_type="LORA",
    marks="lora_[AB]|lora_diag",
    read=_kasa,
    switch="kasa_config",
    fields={"kasa_config": checks.anything},
    form="own weight",
)
OSF = AdapterMethod(
    name="OSF",
    peft_type="OSF",
    marks=r"osf_svd_params\.[USV]_low",
    read=_osf,
    training=frozenset({"effective_rank", "init_weights", "target_svd_config"}),
    unread=frozenset({"rank_pattern"}),
    form="own weight",
)
PEANUT = AdapterMethod(
    name="PEANuT",
    peft_type="PEANUT",
    marks=r"peanut_[AB]|peanut_(?:en|de)coders\.[0-9]{1,4}",
    read=_peanut,
    fields={"act_fn": checks.text, "depth": checks.count, "scaling": checks.alpha},
    training=frozenset({"init_weights"}),
    form="own weight",
)
FROD = AdapterMethod(
    name="FRoD",
    peft_type="FROD",
    marks="frod_lambda_(?:l|s_values)",
    shared=r"frod_(?:V|s_indices|s_size)\.[\w-]+",
    read=_frod,
    absent={"frod_V": f"which PEFT makes of the weights of all modules {SAVE_PROJECTION}"},
    training=frozenset(
        {"projection_prng_key", "save_projection", "frod_dropout", "init_weights", "sparse_rate"}
        | {"regularization_alpha", "progressbar", "runtime_offload_base_weight"}
    ),
    form="own weight",
)
