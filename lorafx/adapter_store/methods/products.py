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
from lorafx.adapter_store.methods.method import AdapterMethod, Given, MadeFactors, of_delta
from lorafx.adapter_store.problems import Problem
from lorafx.kernels.ops.own_rows import KRONECKER, Structure

#: Fields of LyCORIS's methods in PEFT that nothing but training uses, or that shapes tell.
_TRAINING = frozenset(
    {"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
    | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
)


def _pair(given: Given, name: str, core: str, rows: str, columns: str) -> tuple[Tensor, Tensor]:
    """(rows, r) and (r, columns) of `name`_a and `name`_b, with this core between them if it has a
    name."""
    if not core:
        return given.take(f"{name}_a", rows, "r"), given.take(f"{name}_b", "r", columns)
    t = given.take(core, "r", "r", "kernel 1", "kernel 2")
    b, a = given.take(f"{name}_a", "r", rows), given.take(f"{name}_b", "r", "channels")
    return b.mT, torch.einsum("ijkl,jc->ickl", t, a).flatten(1)


def _own_weight(
    given: Given, delta: Callable[..., Tensor], tensors: tuple[Tensor, ...], scale: float
) -> ChangedWeight:
    dora: tuple[Tensor, ...] = ()
    if "dora_scale" in given:  # m of inputs or of outputs
        of_inputs = given.tensors["dora_scale"][1].shape == (1, given.sizes["K"])
        dora = (given.take("dora_scale", *(("1", "K") if of_inputs else ("N", "1"))),)
    of = partial(_with_delta, delta=delta, scale=scale, dora=bool(dora))
    return ChangedWeight(of, (*dora, *tensors), adds=not dora)


def _with_delta(
    weight: Tensor, *tensors: Tensor, delta: Callable[..., Tensor], scale: float, dora: bool
) -> Tensor:
    changed = weight + scale * delta(*tensors[dora:])
    if not dora:
        return changed
    m = tensors[0]
    norms = changed.norm(dim=1 if m.shape[1] == 1 else 0, keepdim=True)
    return changed * torch.where(norms > 0, m / norms, 1)


def _is_low(given: Given, rank: int) -> bool:
    """Whether factors have no more numbers than W (N, K), and can have the file's DoRA."""
    n, k = given.sizes["N"], given.sizes["K"]
    norms = given.tensors["dora_scale"][1] if "dora_scale" in given else None
    of_outputs = norms is None or norms.shape[:1] == (n,)
    return rank * (n + k) <= n * k and of_outputs


def _loha(given: Given) -> MadeFactors | ChangedWeight:
    is_kernel = "hada_t1" in given or "hada_t2" in given
    (b1, a1), (b2, a2) = (
        _pair(given, f"hada_w{i}", f"hada_t{i}" if is_kernel else "", "N", "K") for i in (1, 2)
    )
    r = len(a1)
    if not is_kernel and not _is_low(given, r * r):
        return _own_weight(given, _hadamard, (b1, a1, b2, a2), given.known_scale(r))
    scale = given.scale(r)
    if r * r > min(len(b1), a1.shape[1]):
        return of_delta(_hadamard(b1, a1, b2, a2), scale)
    a, b = a1[:, None] * a2, b1[:, :, None] * b2[:, None]
    return MadeFactors(a.flatten(0, 1), b.flatten(1), scale)


def _hadamard(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    return (b1 @ a1) * (b2 @ a2)


def _halves(given: Given, name: str, core: str) -> tuple[Tensor, Tensor]:
    """u and v of the matrix `name`."""
    rows, columns = f"{name}'s rows", f"{name}'s columns"
    if name in given:
        w = given.take(name, rows, columns, *given.kernel(name)).flatten(1)
    else:
        u, v = _pair(given, name, core if core in given else "", rows, columns)
        if len(v) <= min(len(u), v.shape[1]):
            return u, v
        w = u @ v
    v, u = of_delta(w, None)[:2]
    return u, v


def _lokr(given: Given) -> MadeFactors | ChangedWeight:
    (u1, v1), (u2, v2) = _halves(given, "lokr_w1", ""), _halves(given, "lokr_w2", "lokr_t2")
    r = given.sizes.get("r")  # whole matrices have none
    if r is None and given.config is not None:
        r = given.config.rank(given.path)
        if r is None:
            raise Problem(
                f"{given.place} has whole matrices, and the scale α/r depends on r, which "
                "adapter_config.json lacks"
            )
    given.sizes.update(N=len(u1) * len(u2), K=v1.shape[1] * v2.shape[1])
    is_kernel = any(t.dim() > 2 for _, t in given.tensors.values())
    if is_kernel or _is_low(given, len(v1) * len(v2)):
        scale = 1.0 if r is None else given.scale(r)  # in LyCORIS two whole matrices have none
        return MadeFactors(_kronecker(v1, v2), _kronecker(u1, u2), scale)
    w1, w2 = u1 @ v1, u2 @ v2
    scale = 1.0 if r is None else given.known_scale(r)
    if "dora_scale" in given:
        return _own_weight(given, _kronecker, (w1, w2), scale)
    numbers = torch.cat((scale * w1.flatten(), w2.flatten()))
    return ChangedWeight.structured(Structure(KRONECKER, *w1.shape), numbers)


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
    lycoris=True,
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
    lycoris=True,
)
