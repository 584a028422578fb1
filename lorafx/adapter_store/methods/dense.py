"""Methods that change all of W, as functions of it.

HiRA       W′ = W ∘ (1 + B A)
C3A        W′ = W + C / K of circulant blocks C, whose first rows the file has
RandLoRA   W′ = W + s Σ B diag(λ) A diag(γ) of bases A, B that all modules share
GLoRA      W′ = W + W ∘ A + B, b′ = b + b ∘ D + E + W C
           W′ = W + s (W A + B) of LyCORIS's, A = a₁ a₂, B = b₁ b₂; a₂ a₁ and b₂ b₁ in older files
Full       W′ = W + diff, b′ = b + diff_b, of LyCORIS; diff_b may also stand beside factors
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import (
    MERGE,
    SAVE_PROJECTION,
    AdapterMethod,
    Given,
    MadeFactors,
    of_delta,
)
from lorafx.adapter_store.problems import Problem, Unsupported
from lorafx.kernels.ops.own_rows import SHIFTED_OUTPUT, Structure


def _hira(given: Given) -> ChangedWeight:
    return ChangedWeight(_hira_weight, given.pair("hira"))


def _hira_weight(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return weight + weight * (b @ a)


def _c3a(given: Given) -> ChangedWeight:
    kernel = given.take("c3a_kernel", "N / b", "K / b", "b")
    n, k, b = kernel.shape
    given.sizes.update(N=n * b, K=k * b)
    return ChangedWeight(_with_circulants, (kernel,), adds=True)


def _with_circulants(weight: Tensor, kernel: Tensor) -> Tensor:
    i = torch.arange(kernel.shape[2], device=kernel.device)
    blocks = kernel[:, :, (i - i[:, None]) % len(i)]  # (N / b, K / b, b, b)
    return weight + blocks.transpose(1, 2).reshape(weight.shape) / weight.shape[1]


def _randlora(given: Given) -> ChangedWeight:
    lambdas = given.take("randlora_lambda", "r", "bases")
    gammas = given.take("randlora_gamma", "bases", "smaller side")
    given.check_rank(len(lambdas))
    a = given.take("randlora_A", "r", "1", "largest smaller side")
    b = given.take("randlora_B", "largest side", "all bases", "r")
    bases, side = gammas.shape
    if a.shape[2] < side or b.shape[1] < bases:
        raise Problem(
            f"{given.place}: randlora_A has shape {tuple(a.shape)} and randlora_B "
            f"{tuple(b.shape)}, which are not for {bases} bases of {len(lambdas)} and {side} "
            f"numbers (randlora_gamma)"
        )
    scale = given.option("randlora_alpha", 640) / len(lambdas)
    of = partial(_with_bases, scale=scale)
    return ChangedWeight(of, (a, b, lambdas, gammas), adds=True, misfit=_bases_misfit)


def _bases_misfit(n: int, k: int, a: Tensor, b: Tensor, lambdas: Tensor, gammas: Tensor) -> str:
    side = gammas.shape[1]
    if min(n, k) == side and max(n, k) <= len(b):
        return ""
    return f"and randlora_gamma is for {side} numbers, randlora_B for {len(b)} at most"


def _with_bases(
    weight: Tensor, a: Tensor, b: Tensor, lambdas: Tensor, gammas: Tensor, *, scale: float
) -> Tensor:
    bases, side = gammas.shape
    # PEFT pairs the columns (base, r) of B with the rows (r, base) of A
    rows = (lambdas[:, :, None] * a[:, :, :side] * gammas).flatten(0, 1)
    delta = scale * (b[: max(weight.shape), :bases].flatten(1) @ rows)
    return weight + (delta if weight.shape[1] == side else delta.mT)


def _glora(given: Given) -> ChangedWeight:
    paths = [factor for letter in "ABCDE" for factor in _path(given, letter)]
    return ChangedWeight(_glora_weight, tuple(paths), bias=_glora_bias)


def _path(given: Given, letter: str) -> tuple[Tensor, Tensor]:
    """Two factors of a matrix of GLoRA, or of the column or the number that is broadcast to it."""
    name, is_bias, one = f"glora_{letter}", letter in "DE", torch.ones(1, 1, dtype=given.dtype)
    rows = "K" if letter == "C" else "N"
    columns = "K" if letter in "AB" else "1"
    if f"{name}.X" in given:
        single = letter != "C" and tuple(given.tensors[f"{name}.X"][1].shape) == (1,)
        x = given.take(f"{name}.X", *(("1",) if single else (rows,) if is_bias else (rows, "1")))
        return x.view(-1, 1), one
    if f"{name}.zeros" in given:
        zeros = given.take(f"{name}.zeros", *((rows,) if is_bias else (rows, columns)))
        if not given.meta and bool(zeros.any()):
            raise Problem(f"{given.key(f'{name}.zeros')} is not 0 everywhere")
        return torch.zeros_like(one), one
    r = f"r of {letter}"
    return given.take(f"{name}.Xd", rows, r), given.take(f"{name}.Xu", r, columns)


def _glora_weight(weight: Tensor, *paths: Tensor) -> Tensor:
    return weight + weight * (paths[0] @ paths[1]) + paths[2] @ paths[3]


def _glora_bias(bias: Tensor, weight: Tensor, *paths: Tensor) -> Tensor:
    c, d, e = (left @ right for left, right in zip(paths[4::2], paths[5::2], strict=True))
    added = bias[:, None] * d + e + weight @ c.expand(weight.shape[1], 1)
    return bias + added.squeeze(1)


def _lycoris_glora(given: Given) -> ChangedWeight:
    shape = given.tensors["a1"][1].shape if "a1" in given else (0, 0)
    i, j = (2, 1) if shape[0] < shape[-1] else (1, 2)  # (r, K) in older files
    a_left, a_right = given.take(f"a{i}", "K", "r"), given.take(f"a{j}", "r", "K")
    b_left, b_right = given.take(f"b{i}", "N", "r"), given.take(f"b{j}", "r", "K")
    of = partial(_lycoris_glora_weight, scale=given.known_scale(len(a_right)))
    return ChangedWeight(of, (a_left, a_right, b_left, b_right))


def _lycoris_glora_weight(
    weight: Tensor, left: Tensor, right: Tensor, b_left: Tensor, b_right: Tensor, *, scale: float
) -> Tensor:
    return weight + scale * (weight @ left @ right + b_left @ b_right)


def _full(given: Given) -> MadeFactors | ChangedWeight:
    if "diff" in given:
        key, tensor = given.tensors["diff"]
        if tensor.dim() < 2:
            raise Unsupported(
                f"{key} has shape {tuple(tensor.shape)}: whole differences are served at linears "
                f"and convolutions, not at norms; {MERGE}"
            )
        kernel = given.kernel("diff")
        diff = given.take("diff", "N", "K", *kernel).flatten(1)
        bias = (given.take("diff_b", "N"),) if "diff_b" in given else ()
        if kernel:
            return of_delta(diff, 1.0)._replace(bias=bias[0] if bias else None)
        own_bias = _with_diff_b if bias else None
        return ChangedWeight(_with_diff, (diff, *bias), bias=own_bias, adds=True)
    diff_b = given.take("diff_b", "N")
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        if down in given or up in given:
            kernel = given.kernel(down)
            a, b = (
                given.take(down, "r", "K", *kernel),
                given.take(up, "N", "r", *["1"] * len(kernel)),
            )
            scale = given.scale(len(a))
            return MadeFactors(a, b, scale, diff_b / (scale or 1.0))
    return ChangedWeight.structured(Structure(SHIFTED_OUTPUT, 1), diff_b)


def _with_diff(weight: Tensor, diff: Tensor, *diff_b: Tensor) -> Tensor:
    return weight + diff


def _with_diff_b(bias: Tensor, weight: Tensor, diff: Tensor, diff_b: Tensor) -> Tensor:
    return bias + diff_b


HIRA = AdapterMethod(
    name="HiRA",
    peft_type="HIRA",
    marks="hira_[AB]",
    read=_hira,
    training=frozenset({"hira_dropout", "init_weights"}),
    form="own weight",
)
C3A = AdapterMethod(
    name="C3A",
    peft_type="C3A",
    marks="c3a_kernel",
    read=_c3a,
    training=frozenset({"block_size", "block_size_pattern", "init_weights"}),
    form="own weight",
)
RANDLORA = AdapterMethod(
    name="RandLoRA",
    peft_type="RANDLORA",
    marks="randlora_(?:lambda|gamma)",
    shared="randlora_[AB]",
    read=_randlora,
    absent=dict.fromkeys(
        ("randlora_A", "randlora_B"),
        f"which PEFT draws for the largest of all modules {SAVE_PROJECTION}",
    ),
    fields={"randlora_alpha": checks.alpha},
    training=frozenset(
        {"projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout"}
        | {"init_weights"}
    ),
    form="own weight",
)
GLORA = AdapterMethod(
    name="GLoRA",
    peft_type="GLORA",
    marks=r"glora_[A-E]\.(?:Xd|Xu|X|zeros)",
    read=_glora,
    training=frozenset({"config_A_B", "config_C", "config_D_E", "init_weights"}),
    unread=frozenset({"r"}),
    form="own weight",
)
LYCORIS_GLORA = AdapterMethod(
    name="GLoRA of LyCORIS",
    peft_type=None,
    marks=r"[ab][12](?=\.weight)",
    read=_lycoris_glora,
    form="own weight",
    lycoris=True,
)
FULL = AdapterMethod(
    name="whole differences (full)",
    peft_type=None,
    marks=r"diff(?:_b)?(?!\.)",
    leaves="lora_(?:down|up|[AB])",
    read=_full,
    form="own weight; diff_b beside factors: low rank",
    rank="r; of a kernel its smaller side",
    modules="linears, convolutions",
    lycoris=True,
)
