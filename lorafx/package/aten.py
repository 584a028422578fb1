"""The operators of lorafx in plain aten, for graphs that run where lorafx is not.

    v = (x A[s]ᵀ) · scales[s, i]      masked beyond ranks[s, i]       bmm over requests
    y ← y + v B[s]                    where s ≥ 0, else y

x is (n, rows, K) for n requests, and the factors are gathered by slot: A[s] (n, R, K), B[s]
(n, R, N). So the traffic grows with the requests, not with the slots. Where the rows of a request
do not lie together, each row is taken as a request.

    checked_index    an assertion on the calling thread, which raises before generated code reads;
                     an index that it refuses becomes 0, since the code that reads would end the
                     process
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.errors import LoweringError
from lorafx.kernels.ops.op_library import BankArgs, Ranges, flat
from lorafx.kernels.ops.row_ops import CHECKED_INDEX
from lorafx.package.stand_in import REFUSED
from lorafx.torch_internals.graph_parts import assert_async


def checked(index: Tensor, accepted: Tensor, message: str) -> Tensor:
    """`index`, with 0 where it is not `accepted`; running it raises a RuntimeError there."""
    assert_async(accepted.all(), f"{REFUSED}{message}")
    return torch.where(accepted, index, 0)


def _checked_index(
    index: Tensor, size: int, negative: bool, ignored: int | None, table: str, name: str
) -> Tensor:
    accepted = (index >= (-size if negative else 0)) & (index < size)
    if ignored is not None:
        accepted |= index == ignored
    name = " ".join(name.replace("{}", "").split())
    entries = f"the {size} entries of " if isinstance(size, int) else ""
    return checked(index, accepted, f"{name} points outside of {entries}{table}")


def _by_request(slots: Tensor, rows: Any, count: Any) -> tuple[Tensor, Any, Any]:
    """Slots of groups of adjacent rows, int64, with the numbers of groups and of rows in each."""
    if count == slots.shape[0] * rows:
        return slots.long(), slots.shape[0], rows
    numbers = torch.arange(count, device=slots.device)
    return slots[(numbers // rows) % slots.shape[0]].long(), count, 1


def _expanded(v: Tensor, bank: BankArgs, slot: Tensor, sibling: int, columns: slice) -> Tensor:
    """(n, rows, N), the delta of v (n, rows, R), which is x A[s]ᵀ."""
    live = torch.arange(v.shape[2], device=v.device) < bank.ranks[slot, sibling].unsqueeze(1)
    factor = torch.where(live, bank.scales[slot, sibling].unsqueeze(1), 0)
    v = (v * factor.unsqueeze(1)).to(bank.B.dtype)
    return torch.bmm(v, bank.B[:, :, columns].index_select(0, slot))


def _added(y: Tensor, delta: Tensor, slots: Tensor) -> Tensor:
    """y + delta (n, rows, N) where the slot is not negative: base rows keep their bits."""
    grouped = y.reshape(delta.shape)
    has_adapter = (slots >= 0).reshape(-1, 1, 1)
    return torch.where(has_adapter, (grouped + delta).to(y.dtype), grouped).reshape(y.shape)


def _site(x: Tensor, y: Tensor, bank: BankArgs, ranges: Ranges, rows: int, *extras: Any) -> Tensor:
    _refuse_extras("site", extras[2:])  # behind the weight and bias of a pack
    features = x.shape[-1]
    slots, requests, rows = _by_request(bank.slots, rows, math.prod(x.shape[:-1]))
    slot = slots.clamp(min=0)
    x = x.reshape(requests, rows, features).to(bank.A.dtype)
    parts = []
    for sibling, offset, size in zip(*ranges, strict=True):
        a = bank.A[:, :, sibling * features : (sibling + 1) * features].index_select(0, slot)
        v = torch.bmm(x, a.transpose(1, 2))
        parts.append(_expanded(v, bank, slot, sibling, slice(offset, offset + size)))
    return _added(y, torch.cat(parts, 2) if len(parts) > 1 else parts[0], slots)


def _embedding_site(ids: Tensor, y: Tensor, bank: BankArgs, rows: int, *extras: Any) -> Tensor:
    _refuse_extras("embedding_site", extras)
    slots, requests, rows = _by_request(bank.slots, rows, ids.numel())
    slot = slots.clamp(min=0)
    v = bank.A[slot.unsqueeze(1), ids.reshape(requests, rows)]
    return _added(y, _expanded(v, bank, slot, 0, slice(None)), slots)


def _refuse_extras(op: str, extras: Sequence[Any]) -> None:
    if any(item is not None for item in extras):
        raise LoweringError(f"lorafx::{op} with more than low-rank factors is not exported")


_IN_ATEN: Mapping[Any, Callable[..., Any]] = {
    torch.ops.lorafx.site.default: flat(_site),
    torch.ops.lorafx.embedding_site.default: flat(_embedding_site),
    CHECKED_INDEX: _checked_index,
}


class InAten(fx.Interpreter):
    """Runs a graph with the operators of lorafx in plain aten. Raises LoweringError for those that
    have no form in aten here."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        in_aten = _IN_ATEN.get(target, target)
        if in_aten is target and getattr(target, "namespace", "") == "lorafx":
            raise LoweringError(
                f"{target} is not exported: packages have LoRA on linears and embeddings; leave "
                "the modules whose weights are used otherwise out by exclude_modules"
            )
        return in_aten(*args, **kwargs)
