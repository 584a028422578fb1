"""DoRA: how much an adapter's scale of each output differs from 1, given the base weight.

    y' = c + m / ‖W + s·B A‖ · (W x + s·B A x)        gains = m / ‖W + s·B A‖ − 1    (N,)

The norm is over the inputs of each output: rows of W (N, K); columns of an embedding's (V, N). It
is taken once per adapter, in float32 over the factors as the bank has them, of the base weight
dequantised; PEFT computes it at every call, in the dtype of the activations. An output whose W +
s·B A is zero stays zero under any scale, and gets none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafx.model.bank import Factors
from lorafx.model.convolutions import norm_factors
from lorafx.model.extras import bias_of
from lorafx.model.quantized import dequantize, readable

if TYPE_CHECKING:
    from lorafx.adapter_store.stored import StoredAdapter
    from lorafx.model.sites import Group, Site

#: Entries of W + s·B A that are held at once.
_CHUNK = 1 << 22


def dora_refusal(site: Site) -> str | None:
    """Why DoRA adapters cannot have factors at `site`, or None where they can."""
    entry = site.eligible
    if site.expert_weight is not None:
        return (
            "the weight of each routed expert would have its own norms, which lorafx does not "
            "support"
        )
    if entry.handler is not None:
        return (
            "a registered handler says where the delta goes, but not what DoRA's scale applies to"
        )
    shared = entry.sharding is not None and entry.sharding.product(site.module) is not site.module
    if shared and getattr(site.module, "bias", None) is not None:
        return "several ranks share it, and its bias is added inside the rank's own product"
    if not readable(site.module, entry):
        return (
            "DoRA needs the norm of its base weight, which is in a format that lorafx "
            "cannot read; see lorafx.register(dequantize=...)"
        )
    return None


@torch.no_grad()
def measure(group: Group, factors: Iterable[Factors]) -> None:
    """Fill the gains of those of the group's `factors` that have magnitudes, and the shifts of
    those that have biases, in place.

    Each base weight is read once.

    Raises:
        ConfigError: what holds a base weight is in no known format.
    """
    factors = list(factors)
    _measure_shifts(group, [f for f in factors if f.shift is not None])
    own = [f for f in factors if f.gains is not None]
    for site, offset in zip(group.sites, group.offsets, strict=True):
        here = [f for f in own if offset <= f.offset < offset + site.out_features]
        if not here:
            continue
        weight = base_weight(site)
        for f in here:
            assert f.gains is not None
            f.gains.copy_(_gains(site, weight, f.offset - offset, f))


def _measure_shifts(group: Group, factors: Iterable[Factors]) -> None:
    """s·b + b' − b of each, b being the base's bias."""
    for f in factors:
        shift = torch.zeros(f.B.shape[-1])
        if f.bias is not None:
            shift += f.scale * f.bias
        if f.own_bias is not None:
            site = group.site_of(f.sibling)
            start = f.offset - group.offsets[group.sites.index(site)]
            base = bias_of(site)
            assert base is not None
            shift += f.own_bias - base[start : start + len(shift)].cpu().float()
        assert f.shift is not None
        f.shift.copy_(shift)


def refresh(
    groups: Sequence[Group], adapters: Mapping[str, StoredAdapter], slots: Mapping[str, int]
) -> None:
    """Take the norms of DoRA adapters, and the biases of others, again, in host memory and in
    `slots`.

    Raises:
        ConfigError: as `measure`.
    """
    copies = {name: each.host for name, each in adapters.items() if each.follows_base and each.host}
    for g, group in enumerate(groups):
        measure(group, [f for copy in copies.values() for f in copy.factors.get(g, ())])
    for name, copy in copies.items():
        for g, factors in copy.factors.items():
            if name in slots:
                groups[g].bank.write_by_column(slots[name], factors)


def base_weight(site: Site) -> Tensor:
    """W of the site as dense numbers: (N, K), the weight of an embedding turned round."""
    weight = dequantize(site.module).detach()
    return weight.mT if site.eligible.kind == "embedding" else weight


def _gains(site: Site, weight: Tensor, first: int, f: Factors) -> Tensor:
    """G (N,) float32 on the host, of outputs [first, first + N) of `base_weight`."""
    assert f.magnitude is not None
    own = weight[first : first + f.B.shape[-1]]
    A = f.A.mT if site.eligible.kind == "embedding" else f.A
    A, B = (tensor.to(own.device, torch.float32) for tensor in (A, f.B.mT))
    if site.eligible.kind == "conv":
        A, B = norm_factors(site.module, A, B)
    squares = torch.zeros(len(own), dtype=torch.float32, device=own.device)
    for rows, columns in _chunks(own):
        merged = own[rows, columns].float() + f.scale * (B[rows] @ A[:, columns])
        squares[rows] += merged.square().sum(1)
    norm = squares.sqrt().cpu()
    return torch.where(norm > 0, f.magnitude / norm - 1, 0.0)


def _chunks(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks that cover the matrix, cut along the dimension with the larger steps in memory."""
    along = 0 if weight.stride(0) >= weight.stride(1) else 1
    step = max(1, _CHUNK // max(1, weight.shape[1 - along]))
    for start in range(0, weight.shape[along], step):
        piece = slice(start, start + step)
        yield (piece, slice(None)) if along == 0 else (slice(None), piece)
