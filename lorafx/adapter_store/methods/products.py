"""LoHa and LoKr: products of small matrices, with convolutions' kernels as columns.

LoHa    ΔW = (b₁ a₁) ∘ (b₂ a₂):     B = b₁ ⊙ b₂ of columns, A = a₁ ⊙ a₂ of rows, R = r²
LoKr    ΔW = w₁ ⊗ w₂, wᵢ = uᵢ vᵢ:   B = u₁ ⊗ u₂, A = v₁ ⊗ v₂, R = ρ₁ ρ₂

A w that is saved whole is u = w, v = 1, or the other way round, by its smaller side. Tucker's t
(r, r, kernel) stands between b and a: b a = Σ t[i, j] b[i] ⊗ a[j]. Where A and B would have more
numbers than W, and no kernel is in the file, it is a weight of its own: W′ = W + s ΔW, and with
LyCORIS's DoRA m (W + s ΔW) / ‖W + s ΔW‖.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given, MadeFactors, Misfit, of_delta
from lorafx.kernels.ops.own_rows import KRONECKER, Structure

#: Fields of LyCORIS's methods in PEFT that nothing but training uses, or that shapes tell.
_TRAINING = frozenset(
    {"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
    | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
)


def _pair(given: Given, name: str, core: str, rows: str, columns: str) -> tuple[Tensor, Tensor]:
    """(rows, r) and (r, columns) of `name`_a and `name`_b, with the core between them if there is
    one."""
    r = f"r of {name}"
    if core not in given:
        return given.take(f"{name}_a", rows, r), given.take(f"{name}_b", r, columns)
    t = given.take(core, r, r, "kernel 1", "kernel 2")
    b, a = given.take(f"{name}_a", r, rows), given.take(f"{name}_b", r, "channels of " + name)
    return b.mT, torch.einsum("ijkl,jc->ickl", t, a).flatten(1)


def _own_weight(
    given: Given,
    delta: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    n: int,
    k: int,
    scale: float | None,
) -> ChangedWeight:
    if scale is None:
        raise Misfit(f"{given.place} has no alpha, and without α the scale is not known")
    dora = _norms(given, n, k)
    if not dora and delta is _kronecker:
        w1, w2 = tensors
        structure = Structure(KRONECKER, *w1.shape)
        return ChangedWeight.structured(
            structure, torch.cat((scale * w1.flatten(), w2.flatten())), n, k
        )
    of = partial(_with_delta, delta=delta, scale=scale, dora=bool(dora))
    return ChangedWeight(of, (*dora, *tensors), n, k, adds=not dora)


def _with_delta(
    weight: Tensor, *tensors: Tensor, delta: Callable[..., Tensor], scale: float, dora: bool
) -> Tensor:
    changed = weight + scale * delta(*tensors[dora:])
    if not dora:
        return changed
    m = tensors[0]
    norms = changed.norm(dim=1 if m.shape[1] == 1 else 0, keepdim=True)
    return changed * torch.where(norms > 0, m / norms, 1)


def _norms(given: Given, n: int, k: int) -> tuple[Tensor, ...]:
    """DoRA's m of outputs (N, 1) or of inputs (1, K), if there is one."""
    if "dora_scale" not in given:
        return ()
    m = given.take("dora_scale", "N or 1", "1 or K")
    if tuple(m.shape) not in ((n, 1), (1, k)):
        raise Misfit(
            f"{given.tensors['dora_scale'][0]} has shape {tuple(m.shape)}, it needs ({n}, 1) or "
            f"(1, {k})"
        )
    return (m,)


def _is_low(given: Given, n: int, k: int, rank: int) -> bool:
    """Whether factors have no more numbers than W (N, K), and can have the file's DoRA."""
    norms = given.tensors["dora_scale"][1] if "dora_scale" in given else None
    of_outputs = norms is None or norms.shape[:1] == (n,)
    return rank * (n + k) <= n * k and of_outputs


def _loha(given: Given) -> MadeFactors | ChangedWeight:
    (b1, a1), (b2, a2) = (_pair(given, f"hada_w{i}", f"hada_t{i}", "N", "K") for i in (1, 2))
    if a1.shape != a2.shape:
        raise Misfit(
            f"{given.place}: hada_w1 and hada_w2 multiply to {(len(b1), a1.shape[1])} of rank "
            f"{len(a1)} and {(len(b2), a2.shape[1])} of rank {len(a2)}, which must be equal"
        )
    scale = given.scale(len(a1))
    (n, k), rank = (len(b1), a1.shape[1]), len(a1) * len(a2)
    is_kernel = "hada_t1" in given or "hada_t2" in given
    if not is_kernel and not _is_low(given, n, k, rank):
        return _own_weight(given, _hadamard, (b1, a1, b2, a2), n, k, scale)
    if rank > min(n, k):
        return of_delta(_hadamard(b1, a1, b2, a2), scale)
    a, b = a1[:, None] * a2, b1[:, :, None] * b2[:, None]
    return MadeFactors(a.flatten(0, 1), b.flatten(1), scale)


def _hadamard(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    return (b1 @ a1) * (b2 @ a2)


def _halves(given: Given, name: str, core: str) -> tuple[Tensor, Tensor, int | None]:
    """u, v and the r of the matrix `name`, None where it is saved whole."""
    if name in given:
        dims = given.tensors[name][1].dim()
        kernel = [f"{name}'s kernel {i}" for i in range(dims - 2)]
        w, r = given.take(name, f"{name}'s rows", f"{name}'s columns", *kernel).flatten(1), None
    else:
        u, v = _pair(given, name, core, f"{name}'s rows", f"{name}'s columns")
        r = given.tensors[f"{name}_b"][1].shape[0]
        if len(v) <= min(len(u), v.shape[1]):
            return u, v, r
        w = u @ v
    v, u = of_delta(w, None)[:2]
    return u, v, r


def _lokr(given: Given) -> MadeFactors | ChangedWeight:
    u1, v1, r1 = _halves(given, "lokr_w1", "")
    u2, v2, r2 = _halves(given, "lokr_w2", "lokr_t2")
    if given.config is None:  # in LyCORIS two whole matrices have no scale
        r = r1 or r2
        scale = 1.0 if r is None else given.scale(r)
    else:
        r = given.config.rank(given.path) or r1 or r2
        if r is None:
            raise Misfit(
                f"{given.place} has whole matrices, and the scale α/r depends on r, which "
                "adapter_config.json lacks"
            )
        for found in {r1, r2} - {None, r}:
            raise Misfit(
                f"{given.place} has factors of rank {found}, adapter_config.json says {r} there "
                "(r, rank_pattern); correct the configuration"
            )
        scale = given.scale(r)
    n, k, rank = len(u1) * len(u2), v1.shape[1] * v2.shape[1], len(v1) * len(v2)
    is_kernel = "lokr_t2" in given or any(t.dim() > 2 for _, t in given.tensors.values())
    if not is_kernel and not _is_low(given, n, k, rank):
        return _own_weight(given, _kronecker, (u1 @ v1, u2 @ v2), n, k, scale)
    return MadeFactors(_kronecker(v1, v2), _kronecker(u1, u2), scale)


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """`torch.kron` of matrices of any strides, also of meta tensors."""
    return (left[:, None, :, None] * right[None, :, None]).flatten(2).flatten(0, 1)


LOHA = AdapterMethod(
    name="LoHa",
    peft_type="LOHA",
    marks=r"hada_w[12]_[ab]",
    leaves=r"hada_t[12]|dora_scale",
    read=_loha,
    fields={"alpha": checks.alpha},
    training=_TRAINING,
    form="low rank or own weight",
    rank="r²",
    modules="linears, convolutions",
    against="PEFT, LyCORIS's formula",
)
LOKR = AdapterMethod(
    name="LoKr",
    peft_type="LOKR",
    marks=r"lokr_w[12](?:_[ab])?",
    leaves="lokr_t2|dora_scale",
    read=_lokr,
    fields={"alpha": checks.alpha},
    training=_TRAINING,
    form="low rank or Kronecker product",
    rank="ρ₁ρ₂, of each r or its smaller side",
    modules="linears, convolutions",
    against="PEFT, LyCORIS's formula",
)
