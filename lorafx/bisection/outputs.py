"""Outputs of calls, and how far they are apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.capture.differences import difference, tolerance
from lorafx.session.requests import Names
from lorafx.torch_internals.trees import tree_leaves


@dataclass(frozen=True)
class Outputs:
    """The tensors of a call's result whose dimension 0 holds the requests."""

    leaves: tuple[Tensor, ...]

    @classmethod
    def of(cls, result: Any, rows: int) -> Outputs:
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return cls(
            tuple(
                leaf.detach().clone()
                for leaf in leaves
                if leaf.dim() and leaf.shape[0] == rows and leaf.is_floating_point()
            )
        )

    @classmethod
    def by_row(cls, names: Names, found: Mapping[str | None, Outputs]) -> Outputs:
        """Each row from the outputs of its own adapter, which are those of the whole batch."""
        each = zip(*(found[name].leaves for name in dict.fromkeys(names)), strict=True)
        order = list(dict.fromkeys(names))
        return cls(
            tuple(
                torch.stack([own[order.index(name)][row] for row, name in enumerate(names)])
                for own in each
            )
        )

    def rows(self, which: Sequence[int]) -> Outputs:
        return Outputs(tuple(leaf[list(which)] for leaf in self.leaves))

    @property
    def tolerance(self) -> float:
        """That of the least exact dtype."""
        return max((tolerance(leaf.dtype) for leaf in self.leaves), default=0.0)

    def error(self, want: Outputs, mask: Tensor | None = None) -> float:
        """The largest error of a leaf. `mask` (B, T) leaves padding out, where a leaf is
        (B, T, ...)."""
        return max(map(difference, *_valid(self, want, mask)), default=0.0)


def _valid(got: Outputs, want: Outputs, mask: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    if len(got.leaves) != len(want.leaves):
        raise ValueError(f"{len(got.leaves)} outputs, and {len(want.leaves)} of the reference")
    pairs = list(zip(got.leaves, want.leaves, strict=True))
    if mask is not None:
        kept = mask.bool()
        pairs = [
            (a[kept], b[kept]) if a.shape[:2] == b.shape[:2] == kept.shape else (a, b)
            for a, b in pairs
        ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def fresh(call: Callable[..., Any], inputs: Mapping[str, Any], **more: Any) -> Any:
    """A call with copies of the inputs: a cache is written by each."""
    with torch.no_grad():
        return call(**copy.deepcopy(dict(inputs)), **more)
