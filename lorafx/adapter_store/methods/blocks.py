"""Methods whose factors are put together of blocks, or of vectors that modules share.

GraLoRA    B' A' of k² pairs, one for each block of W, beside a general pair; R = k r + hybrid_r
BD-LoRA    A or B is the diagonal of blocks that the file has as rows
QALoRA     A reads the means of groups of inputs, times the number of groups
VB-LoRA    pieces of A and B are mixtures of the bank's vectors, by the softmax of their logits
UniLoRA    each number of A and B is one of a shared vector's, times a scale
TinyLoRA   B' = B Σ vᵢ Pᵢ, A and B of W's SVD as they are saved; modules share v, or have one each
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.methods.method import (
    MERGE,
    SAVE_PROJECTION,
    AdapterMethod,
    Given,
    MadeFactors,
    PlaceSizes,
)
from lorafx.adapter_store.problems import Problem, Unsupported


def _gralora(given: Given) -> MadeFactors:
    a = given.take("gralora_A", "k", "K / k", "r")
    b = given.take("gralora_B", "k", "r", "N / k")
    k, r, n = b.shape
    if r % k:
        raise Problem(
            f"{given.place}: r = {r} is not divisible by the {k} blocks of {k} (gralora_k)"
        )
    # Row (i, j, s) of A' reads the i-th block of x, and column (i, j, s) of B' writes the j-th of y
    factor_a = torch.block_diag(*a.mT)
    factor_b = b.new_zeros(k, n, k, k, r // k)
    for j, block in enumerate(b):
        factor_b[j, :, :, j] = block.unflatten(0, (k, r // k)).permute(2, 0, 1)
    factor_b = factor_b.flatten(2).flatten(0, 1)
    given.sizes.update(N=len(factor_b), K=factor_a.shape[1])
    general = 0
    if "gralora_A_general" in given or "gralora_B_general" in given:
        more_a = given.take("gralora_A_general", "hybrid_r", "K")
        more_b = given.take("gralora_B_general", "N", "hybrid_r")
        general = len(more_a)
        factor_a, factor_b = torch.cat([factor_a, more_a]), torch.cat([factor_b, more_b], 1)
    return MadeFactors(factor_a, factor_b, given.known_scale(r) * r / (r + general))


def _bdlora(given: Given) -> MadeFactors:
    options = given.option("use_bdlora", {})
    a, b = given.take("lora_A", "r", "K"), given.take("lora_B", "N", "columns of B")
    names, count = given.path.rpartition(".")[2], options.get("nblocks")
    factors = {"a": a, "b": b}
    for letter, factor in factors.items():
        patterns = options.get(f"target_modules_bd_{letter}") or []
        if not any(isinstance(pattern, str) and pattern in names for pattern in patterns):
            continue
        if not isinstance(count, int) or not 0 < count <= len(factor) or len(factor) % count:
            raise Problem(
                f"{given.place}: the {len(factor)} rows of lora_{letter.upper()} are not those of "
                f"{checks.short(count)} blocks (nblocks)"
            )
        factors[letter] = torch.block_diag(*factor.chunk(count))
    return MadeFactors(factors["a"], factors["b"], None)


def _qalora(given: Given) -> MadeFactors:
    return MadeFactors(given.take("lora_A", "r", "groups"), given.take("lora_B", "N", "r"), None)


def _of_groups(
    a: Tensor, b: Tensor, sizes: PlaceSizes, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """A of single inputs, which layers that GPTQ has not quantised have already."""
    size = options.get("qalora_group_size", 16)
    if a.shape[1] * size != sizes.inputs:
        return a, b
    return a.repeat_interleave(size, 1) * (a.shape[1] / size), b


def _mixed(given: Given, name: str, dims: tuple[str, str], count: int) -> Tensor:
    """(dim, dim, length): the mixtures of the bank's vectors that the logits `name` say."""
    bank = given.take("vblora_vector_bank", "vectors", "length")
    if name in given:
        weights, indices = given.take(name, *dims, "vectors").topk(min(count, len(bank)), dim=-1)
        weights = weights.softmax(-1)
    else:
        indices = given.indices(f"{name}_topk_indices", *dims, "topk", below=len(bank))
        weights = bank.new_zeros(*indices.shape)
        given.sizes["topk - 1"] = indices.shape[-1] - 1
        if indices.shape[-1] > 1:
            weights[..., :-1] = given.take(f"{name}_topk_weights", *dims, "topk - 1")
            if not given.meta and float(weights.min()) < 0:
                raise Problem(f"{given.key(f'{name}_topk_weights')} has negative numbers")
        weights[..., -1] = 1 - weights[..., :-1].sum(-1)
    return (weights[..., None] * bank[indices]).sum(-2)


def _unilora(given: Given) -> MadeFactors:
    theta = given.take("unilora_theta_d", "length")
    factors: dict[str, Tensor] = {}
    for letter, dims in (("A", ("r", "K")), ("B", ("N", "r"))):
        indices = given.indices(f"unilora_indices_{letter}", *dims, below=len(theta))
        factors[letter] = theta[indices] * given.take(f"unilora_scales_{letter}", *dims)
    return MadeFactors(factors["A"], factors["B"])


def _vblora(given: Given) -> MadeFactors:
    count = given.option("topk", 2)
    a = _mixed(given, "vblora_logits_A", ("r", "pieces of K"), count)
    b = _mixed(given, "vblora_logits_B", ("pieces of N", "r"), count)
    return MadeFactors(a.flatten(1), b.mT.flatten(0, 1))


#: Numbers that are drawn to find which module of the model a P is.
_MOST_DRAWN = 1 << 24


def _tinylora(given: Given) -> MadeFactors:
    a, b = given.pair("tinylora")
    p = given.take("tinylora_P", "u", "r", "r")
    names = [leaf for leaf in given.tensors if leaf.startswith("tinylora_v.")]
    vectors = {int(leaf.rpartition(".")[2]): given.take(leaf, "u") for leaf in names}
    if sorted(vectors) != list(range(max(len(vectors), 1))):
        raise Problem(
            f"{given.place}: the file has not all of tinylora_v, but {checks.short(names)}"
        )
    index = 0
    if len(vectors) > 1:
        if given.option("weight_tying", 0):
            raise Unsupported(
                f"{given.place}: weight_tying = {given.option('weight_tying')} shares several "
                "vectors by the modules' places in the model, which no file tells; train it with "
                f"1.0 or 0.0, or {MERGE}"
            )
        if not given.meta:
            index = _place_of_p(given, len(vectors))
    mixed = torch.einsum("u,uij->ij", vectors[index], p)
    return MadeFactors(a, b @ mixed)


def _place_of_p(given: Given, count: int) -> int:
    """The module's place among `count`, by the seed with which PEFT draws P."""
    key, p = given.tensors["tinylora_P"]
    if count * p.numel() <= _MOST_DRAWN:
        drawn = _drawn(given.option("projection_seed", 42), count, p.shape)
        places = [i for i, other in enumerate(drawn) if torch.equal(other.to(p.dtype), p.cpu())]
        if len(places) == 1:
            return places[0]
    raise Unsupported(
        f"{key} is none of those that projection_seed draws, so nothing tells which of {count} "
        f"tinylora_v is the module's; train it with weight_tying=1.0, or {MERGE}"
    )


@lru_cache(maxsize=1)
def _drawn(seed: int, count: int, shape: torch.Size) -> list[Tensor]:
    std = 1 / shape[-1] ** 0.5
    generators = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return [
        torch.normal(0.0, std, shape, generator=generator, dtype=torch.float32)
        for generator in generators
    ]


GRALORA = AdapterMethod(
    name="GraLoRA",
    peft_type="GRALORA",
    marks=r"gralora_[AB](?:_general)?",
    read=_gralora,
    fields={"alpha": checks.alpha},
    training=frozenset({"hybrid_r", "gralora_dropout", "gralora_k", "init_weights"}),
    rank="k r + hybrid_r",
)
BDLORA = AdapterMethod(
    name="BD-LoRA",
    peft_type="LORA",
    marks="lora_[AB]",
    read=_bdlora,
    switch="use_bdlora",
    fields={"use_bdlora": checks.mapping},
)
QALORA = AdapterMethod(
    name="QALoRA",
    peft_type="LORA",
    marks="lora_[AB]",
    read=_qalora,
    switch="use_qalora",
    fields={"use_qalora": checks.flag, "qalora_group_size": checks.rank},
    complete=_of_groups,
)
VBLORA = AdapterMethod(
    name="VB-LoRA",
    peft_type="VBLORA",
    marks=r"vblora_logits_[AB](?:_topk_(?:indices|weights))?",
    shared="vblora_vector_bank",
    read=_vblora,
    fields={"topk": checks.rank},
    training=frozenset(
        {"num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout"}
        | {"init_vector_bank_bound", "init_logits_std"}
    ),
)
UNILORA = AdapterMethod(
    name="UniLoRA",
    peft_type="UNILORA",
    marks="unilora_(?:indices|scales)_[AB]",
    shared="unilora_theta_d",
    read=_unilora,
    absent={"unilora_indices_A": "which PEFT saves with UniLoraConfig(save_indices=True) alone"},
    training=frozenset(
        {"proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights"}
        | {"save_indices"}
    ),
)
TINYLORA = AdapterMethod(
    name="TinyLoRA",
    peft_type="TINYLORA",
    marks="tinylora_[ABP]",
    shared=r"tinylora_v\.[0-9]{1,6}",
    read=_tinylora,
    absent={"tinylora_P": f"which PEFT draws by the module's place in the model {SAVE_PROJECTION}"},
    fields={"weight_tying": checks.alpha, "projection_seed": checks.seed},
    training=frozenset(
        {"u", "save_projection", "init_v_bound", "tinylora_dropout", "init_weights"}
    ),
)
