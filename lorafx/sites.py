"""Sites and groups: the modules that carry LoRA, and what they share.

A *site* is one LoRA-eligible module instance. A *group* is a set of sibling sites (same parent
module, same kind, same input size, same dtype and device) whose low-rank factors live in one
bank, so that one shrink over the bank can serve all siblings that turn out to share an input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorafx.adapter_store.bank import Bank
from lorafx.registry import Eligible


@dataclass(frozen=True, eq=False)
class Site:
    """One module instance that may carry LoRA.

    Attributes:
        path: canonical dotted path from the root ("" for the root itself).
        aliases: the other paths that reach the same instance.
        module: the instance; never replaced or changed.
        eligible: the registry entry that matched, nearest along the MRO.
        in_features, out_features: K and N of the delta; for embeddings K is the vocabulary.
        dtype, device: of the base weight (the compute dtype where the weight is not floating).
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    eligible: Eligible
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    @property
    def has_own_forward(self) -> bool:
        """Whether a subclass or the instance overrides the forward of the registered class."""
        forward = type(self.module).forward
        return "forward" in vars(self.module) or forward is not self.eligible.cls.forward


@dataclass(frozen=True, eq=False)
class Group:
    """Sibling sites over one bank. `offsets[i]` is site i's first column in the bank's B."""

    sites: tuple[Site, ...]
    offsets: tuple[int, ...]
    bank: Bank
