"""`adapter_gates` of a call: several adapters, each with a weight, for each row or each token.

(B, k)      a row's mix is a sum of adapters, which has a name like any other
(B, T, k)   a token has k adapters and weights of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store.names import BASE, MOST_GATES, AdapterName, Arrow, Mixture, named_sum
from lorafx.errors import BatchError
from lorafx.model.runtime import Gates
from lorafx.program.frame import PER_REQUEST, SlotForm
from lorafx.runtime.requests import Requests, checked_names, requests_of


def requests_with_gates(
    names: Sequence[AdapterName] | None,
    slots: Tensor | None,
    gates: Any,
    loaded: Sequence[str],
) -> Requests | None:
    """As `requests_of`, with the `adapter_gates` of the call, which may be None.

    Raises:
        BatchError: `gates` are not a pair of tensors of one shape, (B, k) or (B, T, k); more than
            `MOST_GATES`; an index out of range; a weight that is negative or not finite; or
            `adapter_slots` beside them.
    """
    if gates is None:
        return requests_of(names, slots, loaded)
    if slots is not None:
        raise BatchError("adapter_slots and adapter_gates each say what a token gets; give one")
    pointed = checked_names(names) or tuple(loaded)
    refuse_routes(pointed)
    indices, weights = _checked(gates, pointed)
    bases = [index for index, name in enumerate(pointed) if name in (None, BASE)]
    unused = torch.isin(indices, torch.tensor([-1, *bases])) | (weights == 0)
    indices, weights = torch.where(unused, -1, indices), torch.where(unused, 0, weights)
    if indices.dim() == 2:
        rows = zip(indices.tolist(), weights.tolist(), strict=True)
        return Requests(tuple(_sum(pointed, zip(*row, strict=True)) for row in rows))
    count = indices.shape[-1]
    if count == 1 and bool((weights[indices >= 0] == 1).all()):
        return requests_of(pointed, indices[..., 0])
    return requests_of_tokens(pointed, indices, weights)


def requests_of_tokens(
    names: Sequence[str | None], indices: Tensor, weights: Tensor, layers: tuple[str, ...] = ()
) -> Requests:
    """Those of gates (B, T, k), int64 and float32, which are on the host; with `layers`, paths of
    sites, weights (B, T, L, k)."""
    unused = (weights == 0).all(2) if layers else weights == 0
    indices = torch.where(unused, -1, indices)
    if bool((indices < 0).all()):
        return Requests((None,) * len(indices), all_tokens=True)
    more = _rounded(indices.shape[-1]) - indices.shape[-1]
    indices = torch.nn.functional.pad(indices, (0, more), value=-1)
    weights = torch.nn.functional.pad(weights, (0, more))
    return Requests(tuple(names), indices, weights=weights, layers=layers)


def _rounded(count: int) -> int:
    """The number of gates of a graph for `count`: a power of two, so that it serves others, too."""
    return max(2, 1 << (count - 1).bit_length())


def form_of_names(names: Iterable[str | None]) -> SlotForm:
    """How rows with these names have slots: with a route each has those that modules choose from,
    their number rounded."""
    routes = routes_among(names)
    if not routes:
        return PER_REQUEST
    most = max(len(route.experts) for route in routes)
    return SlotForm(gates=_rounded(most), chosen=max(route.top_k for route in routes))


def routes_among(names: Iterable[str | None]) -> list[Arrow]:
    return [name for name in names if isinstance(name, Arrow)]


def refuse_routes(names: Iterable[str | None]) -> None:
    """Raise BatchError for a route, where rows have no gates."""
    for route in routes_among(names):
        raise BatchError(
            f"{route!r} chooses adapters by itself, which calls of a compiled model and its "
            "generate() serve for whole rows. It has no part in adapter_slots or adapter_gates, "
            "beside aLoRA, and in continuous batching: name one of its adapters there"
        )


def gates_of_rows(
    names: Sequence[str | None], slots: Mapping[str | None, int], count: int
) -> Gates:
    """`count` gates for each row: those that its route chooses from, or its adapter."""
    of_rows, weights, chosen = [], [], []
    for name in names:
        route = name if isinstance(name, Arrow) else None
        own = [slots[n] for n in ((name,) if route is None else route.experts)]
        of_rows.append(own + [-1] * (count - len(own)))
        weights.append([float(own[0] >= 0 and route is None)] + [0.0] * (count - 1))
        chosen.append(
            (-1, 0, 1.0) if route is None else (slots[route], route.top_k, route.temperature)
        )
    routes, top_k, temperatures = zip(*chosen, strict=True)
    return Gates(
        torch.tensor(of_rows, dtype=torch.int32).T.contiguous(),
        torch.tensor(weights).T.contiguous(),
        torch.tensor(routes, dtype=torch.int32),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(temperatures),
    )


def _checked(gates: Any, names: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """Indices int64 and weights float32 on the host."""
    if not isinstance(gates, (tuple, list)) or len(gates) != 2 or not all(map(_is_dense, gates)):
        raise BatchError(
            "adapter_gates must be a pair of tensors, (slots, weights), which are dense and have "
            f"values, got {gates!r:.80}"
        )
    slots, weights = gates
    integers = not (slots.is_floating_point() or slots.is_complex() or slots.dtype == torch.bool)
    if not integers or not weights.is_floating_point():
        raise BatchError(
            "adapter_gates must be integers, which point at adapters, and floating-point weights, "
            f"got {slots.dtype} and {weights.dtype}"
        )
    if slots.shape != weights.shape or slots.dim() not in (2, 3) or not slots.numel():
        raise BatchError(
            "adapter_gates must have one shape, (B, k) or (B, T, k), got "
            f"{tuple(slots.shape)} and {tuple(weights.shape)}"
        )
    if slots.shape[-1] > MOST_GATES:
        raise BatchError(
            f"adapter_gates have {slots.shape[-1]} adapters for each token, and may have "
            f"{MOST_GATES}; keep those of the largest weights"
        )
    slots, weights = slots.to("cpu", torch.int64), weights.to("cpu", torch.float32)
    if not -1 <= int(slots.min()) <= int(slots.max()) < len(names):
        raise BatchError(
            f"adapter_gates point at {int(slots.min())} to {int(slots.max())}, but there are "
            f"{len(names)} adapters ({', '.join(map(str, names)) or 'none'}); -1 is the base model"
        )
    wrong = weights[~(weights.isfinite() & (weights >= 0))]
    if len(wrong):
        raise BatchError(
            f"adapter_gates have the weight {float(wrong[0])}; weights are finite, and 0 or more"
        )
    return slots, weights


def _is_dense(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_nested or value.is_meta)


def _sum(names: Sequence[str | None], mix: Iterable[tuple[int, float]]) -> str | None:
    """The name of a row's mix."""
    weights: dict[str, float] = {}
    for index, weight in mix:
        name = names[index] if index >= 0 else None
        if name is None:
            continue
        for member, share in name.weights if isinstance(name, Mixture) else ((name, 1.0),):
            weights[member] = weights.get(member, 0.0) + share * weight
    return named_sum(weights)
