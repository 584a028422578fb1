"""How large the delta of an adapter is at each site, and why one is zero."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.adapter_store.stored import StoredAdapter
from lorafx.model.bank import Factors
from lorafx.model.sites import Group, Site
from lorafx.torch_internals.graph_parts import unset_fake_temporarily


@dataclass(frozen=True)
class DeltaNorms:
    """An adapter's norms of ΔW by site, by site the reason why it changes nothing there, and the
    sites with a weight of its own, which norms leave out."""

    norms: dict[str, float]
    idle: dict[str, str]
    owned: tuple[str, ...]

    @property
    def why_idle(self) -> str:
        """Why the adapter changes nothing anywhere, or ""."""
        if self.owned or len(self.idle) < len(self.norms) or not self.idle:
            return ""
        return "no effect, because " + " or ".join(sorted(set(self.idle.values())))


#: By version of an adapter: another version is another object.
_DELTAS: weakref.WeakKeyDictionary[StoredAdapter, DeltaNorms] = weakref.WeakKeyDictionary()


def deltas_of(
    stored: StoredAdapter, groups: Sequence[Group], *, quick: bool = False
) -> DeltaNorms | None:
    """The deltas of an adapter; None if `quick` and they have not been computed.

    ‖s·B A‖² = s² tr((Bᵀ B) (A Aᵀ)), whose products are (r, r), so ΔW is not computed.
    """
    if stored not in _DELTAS and not quick:
        squares: dict[str, float] = {}
        reasons: dict[str, list[str]] = {}
        with unset_fake_temporarily(), torch.no_grad():
            for index, parts in stored.numbers.factors.items():
                for factors in parts:
                    site = groups[index].site_of(factors.sibling)
                    square = _squared_norm(site, factors)
                    squares[site.path] = squares.get(site.path, 0.0) + square
                    reasons.setdefault(site.path, []).append(_why_idle(factors))
        sites = [path for path in stored.sites if path not in stored.owned]
        idle = {path: reasons[path][0] for path in sites if all(reasons.get(path, [""]))}
        norms = {path: squares.get(path, 0.0) ** 0.5 for path in sites}
        _DELTAS[stored] = DeltaNorms(norms, idle, stored.owned)
    return _DELTAS.get(stored)


def _squared_norm(site: Site, factors: Factors) -> float:
    a, b = _at_least_float32(factors.A), _at_least_float32(factors.B)
    if site.eligible.kind == "embedding":
        a = a.mT  # (V, r)
    if factors.ranks is not None:  # columns beyond an expert's rank are unused
        within = torch.arange(b.shape[-2]) < factors.ranks[:, None]
        b = b * within[..., None]
    # The product of these squares may exceed float32, even if ΔW does not.
    square = ((a @ a.mT).double() * (b @ b.mT).double()).sum((-2, -1))
    scale = torch.as_tensor(factors.scale, dtype=square.dtype)
    return max(float((square * scale**2).sum()), 0.0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _why_idle(factors: Factors) -> str:
    if any(extra is not None and bool(extra.any()) for extra in (factors.gains, factors.shift)):
        return ""
    named = (("B", factors.B), ("A", factors.A), ("its scale", torch.as_tensor(factors.scale)))
    return next((f"{name} is zero" for name, tensor in named if not bool(tensor.any())), "")
