"""Methods that turn or scale the inputs or the outputs of a weight: W′ = W R or W′ = R W.

OFT     W′ = W Rᵀ of blocks R = (I − Q)(I + Q)⁻¹ on the diagonal, or its series of Neumann
IA³     W′ = W diag(l) of a feed-forward module, W′ = diag(l) W, b′ = l ∘ b of others
HRA     W′ = W (I − 2 u₁u₁ᵀ) … (I − 2 uᵣuᵣᵀ) of unit vectors, or of an orthonormal basis of them
RoAd    pairs of outputs (and of the bias) turned and scaled: y′ = c₁ ∘ y + c₂ ∘ (−y₂, y₁)
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given
from lorafx.adapter_store.problems import Problem, Unsupported
from lorafx.kernels.ops.own_rows import TURNED_INPUT, TURNED_OUTPUT, Structure
from lorafx.model.targets import pattern

#: The first release of PEFT with today's series of Neumann.
_NEUMANN = (0, 18)


def _oft(given: Given) -> ChangedWeight:
    r = given.take("oft_R", "blocks", "numbers of a block")
    key, (blocks, count) = given.key("oft_R"), r.shape
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) // 2 != count:
        raise Problem(
            f"{key} has shape {tuple(r.shape)}: {count} numbers are no triangle above a diagonal"
        )
    shared = given.option("block_share", False)
    if shared and blocks != 1:
        raise Problem(f"{key} has {blocks} blocks, and with block_share all are one")
    terms = 0
    if given.option("use_cayley_neumann", True):
        assert given.config is not None
        if given.config.peft_version is None or given.config.peft_version < _NEUMANN:
            raise Unsupported(
                f"{given.place}: use_cayley_neumann meant another series before PEFT 0.18, and "
                "adapter_config.json names no later peft_version; train it again, or merge it "
                "into a copy of the base model by PEFT 0.17"
            )
        terms = given.option("num_cayley_neumann_terms", 5)
    q = r.new_zeros(blocks, size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=r.device)
    q[:, rows, columns] = r
    q = q - q.mT
    if given.option("coft", False):  # COFT keeps each block near the identity
        bound = given.option("eps", 6e-5) / math.sqrt(blocks)
        norm = q.norm(dim=(1, 2), keepdim=True)
        q = torch.where(norm <= bound, q, bound * (q / norm))
    if not shared:
        given.sizes["K"] = blocks * size
    turns = cayley(q, terms).mT - torch.eye(size, dtype=r.dtype, device=r.device)
    return ChangedWeight.structured(Structure(TURNED_INPUT, size), turns)


def cayley(q: Tensor, terms: int = 0) -> Tensor:
    """(I − Q)(I + Q)⁻¹, or of so many `terms` of PEFT's series for it."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if not terms:
        return torch.linalg.solve(eye + q, eye - q, left=False)
    result = eye + 2 * q if terms > 1 else eye
    if terms > 2:
        power = q @ q
        result = result + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            result = result + 2 * power
        result = result + power @ q
    return result


def _ia3(given: Given) -> ChangedWeight:
    path, modules = given.path, given.option("feedforward_modules")
    if modules is None:
        raise Problem(
            f"{given.key('ia3_l')} scales inputs or outputs as feedforward_modules says, which "
            "adapter_config.json lacks; name them there"
        )
    if isinstance(modules, str):
        inputs = pattern(modules).fullmatches(path)
    else:
        inputs = path.endswith(tuple(modules))
    kernel = ["1"] * len(given.kernel("ia3_l"))
    if inputs:
        scales = given.take("ia3_l", "1", "K by feedforward_modules", *kernel)
    else:
        scales = given.take("ia3_l", "N by feedforward_modules", "1", *kernel)
    given.sizes["K" if inputs else "N"] = scales.numel()
    structure = Structure(TURNED_INPUT if inputs else TURNED_OUTPUT, 1)
    return ChangedWeight.structured(structure, scales - 1)


def _hra(given: Given) -> ChangedWeight:
    u = given.take("hra_u", "K", "r")
    given.check_rank(u.shape[1])
    if not given.meta and not bool(u.norm(dim=0).all()):
        raise Problem(f"{given.key('hra_u')} has a column of zeros, which is no direction")
    return ChangedWeight(partial(_reflected, basis=given.option("apply_GS", False)), (u,))


def _reflected(weight: Tensor, u: Tensor, *, basis: bool) -> Tensor:
    found: list[Tensor] = []
    for column in u.mT:
        for earlier in found if basis else ():
            column = column - (earlier @ column) * earlier
        found.append(column / column.norm())
    for unit in found:  # of a basis, the order counts for nothing
        weight = weight - 2 * torch.outer(weight @ unit, unit)
    return weight


def _turned_pairs(given: Given) -> ChangedWeight:
    theta, alpha = given.take("road_theta", "angles"), given.take("road_alpha", "angles")
    variant, group = given.choice("variant", "road_1", _PARTS), given.option("group_size", 64)
    outputs, rest = divmod(2 * len(theta), _PARTS[variant])
    if rest or group % 2 or outputs % group:
        raise Problem(
            f"{given.key('road_theta')} has shape {tuple(theta.shape)}, which are no groups "
            f"of {group} outputs (group_size) by {variant}"
        )
    if variant == "road_1":  # both of a pair have one angle
        theta, alpha = (
            t.unflatten(0, (-1, group // 2)).repeat_interleave(2, 0).flatten()
            for t in (theta, alpha)
        )
    if variant == "road_4":
        theta, alpha = (t.unflatten(0, (-1, 2, group)).transpose(0, 1) for t in (theta, alpha))
        angles, scales = tuple(t.flatten() for t in theta), tuple(t.flatten() for t in alpha)
    else:
        angles, scales = (theta, theta), (alpha, alpha)
    same = (scales[0] * angles[0].cos()).view(-1, 2, group // 2) - 1
    other = (scales[1] * angles[1].sin()).view(-1, 2, group // 2)
    corners = (same[:, 0], -other[:, 0]), (other[:, 1], same[:, 1])
    rows = [torch.cat([torch.diag_embed(corner) for corner in row], 2) for row in corners]
    given.sizes["N"] = outputs
    return ChangedWeight.structured(Structure(TURNED_OUTPUT, group), torch.cat(rows, 1))


#: Angles by variant, in halves of the outputs.
_PARTS = {"road_1": 1, "road_2": 2, "road_4": 4}


OFT = AdapterMethod(
    name="OFT",
    peft_type="OFT",
    marks="oft_R",
    read=_oft,
    fields={
        "use_cayley_neumann": checks.flag,
        "num_cayley_neumann_terms": checks.terms,
        "block_share": checks.flag,
        "coft": checks.flag,
        "eps": checks.alpha,
    },
    training=frozenset({"oft_block_size", "module_dropout", "init_weights"}),
    unread=frozenset({"r"}),
    form="turned inputs",
)
IA3 = AdapterMethod(
    name="IA³",
    peft_type="IA3",
    marks="ia3_l",
    read=_ia3,
    fields={"feedforward_modules": checks.targets},
    training=frozenset({"init_ia3_weights"}),
    form="scaled inputs or outputs",
)
HRA = AdapterMethod(
    name="HRA",
    peft_type="HRA",
    marks="hra_u",
    read=_hra,
    fields={"apply_GS": checks.flag},
    training=frozenset({"init_weights"}),
    form="own weight",
)
ROAD = AdapterMethod(
    name="RoAd",
    peft_type="ROAD",
    marks="road_(?:theta|alpha)",
    read=_turned_pairs,
    fields={"variant": checks.anything, "group_size": checks.rank},
    training=frozenset({"init_weights"}),
    form="turned outputs",
)
