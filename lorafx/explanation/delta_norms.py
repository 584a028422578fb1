"""How large an adapter's ΔW is, module by module, and where it is nothing.

‖s·B A‖² = s² tr((Bᵀ B) (A Aᵀ))      the products are (r, r): ΔW itself is never made
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.adapter_store.stored import StoredAdapter
from lorafx.model.bank import Factors
from lorafx.model.sites import Group, Site
from lorafx.torch_internals.fake_tensors import unset_fake_temporarily


@dataclass(frozen=True)
class Deltas:
    """Of one adapter by site: the norm of ΔW, and why it changes nothing there, if so."""

    norms: dict[str, float]
    idle: dict[str, str]

    @property
    def why_idle(self) -> str:
        """Why the adapter changes nothing anywhere; "" if it does somewhere."""
        if len(self.idle) < len(self.norms) or not self.idle:
            return ""
        return "no effect, because " + " or ".join(sorted(set(self.idle.values())))


#: Of adapters that were looked at. Theirs do not change: a new version is another object.
_KNOWN: weakref.WeakKeyDictionary[StoredAdapter, Deltas] = weakref.WeakKeyDictionary()


def deltas_of(stored: StoredAdapter, groups: Sequence[Group]) -> Deltas | None:
    """The deltas of an adapter whose numbers are in host memory; None where they are not."""
    if stored not in _KNOWN:
        copy = stored.host or (stored.dropped() if stored.dropped is not None else None)
        if copy is None:
            return None
        with unset_fake_temporarily(), torch.no_grad():
            squares: dict[str, float] = {}
            zeros: dict[str, list[str]] = {}
            for index, factors in copy.factors.items():
                for site, own in _by_site(groups[index], factors):
                    squares[site.path] = squares.get(site.path, 0.0) + _square(site, own)
                    zeros.setdefault(site.path, []).append(_why_nothing(own))
        idle = {
            path: reasons[0]
            for path, reasons in zeros.items()
            if all(reasons) and path not in stored.owned
        }
        norms = {path: squares.get(path, 0.0) ** 0.5 for path in stored.sites}
        _KNOWN[stored] = Deltas(norms, idle)
    return _KNOWN[stored]


def known_deltas(stored: StoredAdapter) -> Deltas | None:
    """As `deltas_of`, if that was asked for before."""
    return _KNOWN.get(stored)


def _by_site(group: Group, factors: Sequence[Factors]) -> Iterator[tuple[Site, Factors]]:
    return ((group.site_of(own.sibling), own) for own in factors)


def _square(site: Site, factors: Factors) -> float:
    """‖ΔW‖² of one part."""
    a, b = _wide(factors.A), _wide(factors.B)
    if site.eligible.kind == "embedding":
        a = a.mT  # (V, r)
    if factors.ranks is not None:  # what is behind an expert's own rank is not read
        within = torch.arange(b.shape[-2]) < factors.ranks[:, None]
        b = b * within[..., None]
    # Each is a square already: their product would leave float32 where ΔW itself does not.
    square = ((a @ a.mT).double() * (b @ b.mT).double()).sum((-2, -1))
    scale = torch.as_tensor(factors.scale, dtype=square.dtype)
    return max(float((square * scale**2).sum()), 0.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _why_nothing(factors: Factors) -> str:
    """Why one part changes nothing; "" if it may."""
    others = (factors.gains, factors.shift)
    if any(tensor is not None and bool(tensor.any()) for tensor in others):
        return ""
    named = (("B", factors.B), ("A", factors.A), ("its scale", torch.as_tensor(factors.scale)))
    return next((f"{name} is zero" for name, tensor in named if not bool(tensor.any())), "")
