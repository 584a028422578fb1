"""Methods whose factors are saved, with something between them or a fixed one of the two.

AdaLoRA    A' = E A, s = α / (ranknum + 1e-5), ranknum = init_r
DeLoRA     A' = λ / r / (‖aᵢ‖ ‖bᵢ‖) A, times ‖W‖ of each column, which the file has
MiSS       B = blockᵀ (N, r), A the sums over inputs whose index is i modulo r;
           "bat": W' = W + W B + B of each block (r, r) of W
LoCon      A' = Σ mid[i, j] a[j] of a convolution
VeRA       A' = d A, B' = b B, of projections that all modules share, saved or drawn by a seed
PVeRA      the same, without its noise
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given, MadeFactors, PlaceSizes
from lorafx.adapter_store.problems import Problem, Unsupported
from lorafx.model.bank import SharedPair

_EPS = 1e-5
_SMALLEST_NORM = 1e-4


def _adalora(given: Given) -> MadeFactors:
    (a, b), e = given.pair("lora", empty=True), given.take("lora_E", "r", "1", empty=True)
    assert given.config is not None
    if not len(a):  # all of its singular values were pruned
        return MadeFactors(a.new_zeros(1, a.shape[1]), b.new_zeros(len(b), 1))
    alpha, ranknum = given.config.lora_alpha, given.number("ranknum")
    if ranknum is None:
        ranknum = float(given.option("init_r", 12))
    scale = (alpha if alpha > 0 else len(a)) / (ranknum + _EPS)
    return MadeFactors(a * e, b, scale)


def _delora(given: Given) -> MadeFactors:
    a, b = given.pair("delora")
    bound, norms = given.take("delora_lambda", "1"), given.take("delora_w_norm", "K")
    lengths = a.norm(dim=1).clamp(min=_SMALLEST_NORM) * b.norm(dim=0).clamp(min=_SMALLEST_NORM)
    return MadeFactors((bound / len(a) / lengths)[:, None] * a * norms, b)


def _miss(given: Given) -> MadeFactors | ChangedWeight:
    if given.option("init_weights") == "bat":
        blocks = given.take("miss_block", "N / r", "r", "r")
        given.check_rank(blocks.shape[1])
        given.sizes["N"] = blocks.shape[0] * blocks.shape[1]
        return ChangedWeight(_multiplied_blocks, (blocks,), misfit=_blocks_misfit)
    block = given.take("miss_block", "r", "N")
    given.check_rank(len(block))
    return MadeFactors(block.new_empty(len(block), 0), block.mT)


def _blocks_misfit(n: int, k: int, blocks: Tensor) -> str:
    r = blocks.shape[1]
    return f"and blocks of {r} do not divide its inputs" if k % r else ""


def _multiplied_blocks(weight: Tensor, b: Tensor) -> Tensor:
    r = b.shape[1]
    w = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r))  # (N / r, r, K / r, r)
    return (w + w @ b[:, None] + b[:, :, None]).flatten(2).flatten(0, 1)


def _complete_miss(
    a: Tensor, b: Tensor, sizes: PlaceSizes, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """A as sums of every r-th input; B of "mini" repeated over the outputs."""
    eye = torch.eye(len(a), dtype=b.dtype, device=b.device)
    k, n = sizes.inputs, sizes.outputs
    times = n // len(b) if options.get("init_weights") == "mini" and n % len(b) == 0 else 1
    return eye.repeat(1, -(-k // len(a)))[:, :k], b.repeat(times, 1)


def _locon(given: Given) -> MadeFactors:
    mid = given.take("lora_mid", "r", "r", "kernel 1", "kernel 2")
    a = given.take("lora_down", "r", "channels", "1", "1").flatten(1)
    b = given.take("lora_up", "N", "r", "1", "1").flatten(1)
    a = torch.einsum("ijkl,jc->ickl", mid, a).flatten(1)
    return MadeFactors(a, b, given.scale(len(b.mT)))


def _pvera(given: Given) -> MadeFactors | ChangedWeight:
    if given.option("sample_at_inference"):
        raise Unsupported(
            "PVeRA with sample_at_inference draws its activations; set it to false in "
            "adapter_config.json, which serves their mean"
        )
    d, b = given.take("pvera_lambda_d", "2r"), given.take("pvera_lambda_b", "N")
    if _are_drawn(given, "pvera_A", "pvera_B") and not len(d) % 2:
        return _on_drawn(d[: len(d) // 2], b)
    shared_a = given.take("pvera_A", "2r", "largest K")
    shared_b = given.take("pvera_B", "largest N", "r")
    rank = len(d) // 2
    if 2 * rank != len(d) or shared_b.shape != (max(len(shared_b), len(b)), rank):
        raise Problem(
            f"{given.place}: pvera_B has shape {tuple(shared_b.shape)}, it needs ({len(b)} or "
            f"more, {rank}), half of pvera_lambda_d"
        )
    return ChangedWeight.scaled_pair(d[:rank], b, SharedPair(shared_a[:rank], shared_b))


def _vera(given: Given) -> MadeFactors | ChangedWeight:
    d, b = given.take("vera_lambda_d", "r"), given.take("vera_lambda_b", "N")
    if _are_drawn(given, "vera_A", "vera_B"):
        return _on_drawn(d, b)
    shared_a, shared_b = given.take("vera_A", "r", "largest K"), given.take("vera_B", "any N", "r")
    if len(shared_b) < len(b):
        raise Problem(
            f"{given.place}: vera_B has shape {tuple(shared_b.shape)}, it needs {len(b)} rows"
        )
    return ChangedWeight.scaled_pair(d, b, SharedPair(shared_a, shared_b))


def _are_drawn(given: Given, *leaves: str) -> bool:
    """Whether the projections are not in the file but drawn by their seed."""
    if not given.option("save_projection", True) and not any(leaf in given for leaf in leaves):
        return True
    for leaf in leaves:
        if leaf not in given:
            raise Problem(f"the file has no {leaf}; save the adapter with save_projection=True")
    return False


def _on_drawn(d: Tensor, b: Tensor) -> MadeFactors:
    """Without A, which has the inputs of the widest module: B' = b B d is multiplied into later."""
    return MadeFactors(d.new_empty(len(d), 0), b[:, None] * d)


def _cut_or_draw(
    a: Tensor, b: Tensor, sizes: PlaceSizes, options: Mapping[str, Any], *, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """A of so many inputs; where A has none, both as PEFT draws them, `rows` · r rows of A."""
    if a.shape[1]:
        return a[:, : sizes.inputs], b
    seed = options.get("projection_prng_key", 0)
    drawn, state = _drawn(seed, rows * len(a), sizes.widest)
    generator = torch.Generator()
    generator.set_state(state)
    return drawn[: len(a), : sizes.inputs].to(a), b * _kaiming(len(b), len(a), generator).to(b)


@lru_cache(maxsize=1)
def _drawn(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A of all modules, and the state of the generator that draws B after it."""
    generator = torch.Generator().manual_seed(seed)
    return _kaiming(rows, columns, generator), generator.get_state()


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    numbers = torch.empty(rows, columns, dtype=torch.float32)
    return numbers.uniform_(-bound, bound, generator=generator)


ADALORA = AdapterMethod(
    name="AdaLoRA",
    peft_type="ADALORA",
    marks="lora_E",
    leaves="lora_A|lora_B|ranknum",
    read=_adalora,
    fields={"init_r": checks.rank},
    training=frozenset(
        {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
        | {"total_step"}
    ),
    unread=frozenset({"rank_pattern"}),
    rank="r that was left",
    modules="linears, convolutions",
)
DELORA = AdapterMethod(
    name="DeLoRA",
    peft_type="DELORA",
    marks="delora_A|delora_B|delora_lambda",
    leaves="delora_w_norm",
    read=_delora,
    training=frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"}),
)
MISS = AdapterMethod(
    name="MiSS",
    peft_type="MISS",
    marks="miss_block",
    read=_miss,
    fields={"init_weights": checks.anything, "mini_r": checks.rank},
    training=frozenset({"miss_dropout"}),
    complete=_complete_miss,
)
LOCON = AdapterMethod(
    name="LoCon with lora_mid",
    peft_type=None,
    marks="lora_mid",
    leaves="lora_down|lora_up",
    read=_locon,
    lycoris=True,
    modules="convolutions",
)
PVERA = AdapterMethod(
    name="PVeRA",
    peft_type="PVERA",
    marks="pvera_lambda_[bd]",
    shared="pvera_A|pvera_B",
    read=_pvera,
    fields={
        "sample_at_inference": checks.flag,
        "save_projection": checks.flag,
        "projection_prng_key": checks.seed,
    },
    training=frozenset({"pvera_dropout", "d_initial", "init_weights", "generator_seed"}),
    complete=partial(_cut_or_draw, rows=2),
    rank="r, or once for all of a pair",
)
VERA = AdapterMethod(
    name="VeRA",
    peft_type="VERA",
    marks="vera_lambda_[bd]",
    shared="vera_A|vera_B",
    read=_vera,
    fields={"save_projection": checks.flag, "projection_prng_key": checks.seed},
    training=frozenset({"vera_dropout", "d_initial", "init_weights"}),
    complete=_cut_or_draw,
    rank="r, or once for all of a pair",
)
