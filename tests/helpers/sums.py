"""The oracle of sums: W + Σ_i w_i · ΔW_i on a copy of the base, run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oracle
import torch
from dense_merge import Case
from torch import nn

import lorafx


class SumCase(Case):
    """A `Case` in which a request may name weights by name."""

    @classmethod
    def of(cls, case: Case) -> SumCase:
        """The same base, adapters and merged copies."""
        return cls(case.base, case.folders, dict(case.merged))

    def alone(self, name: Any) -> nn.Module:
        """As of any case; of a mapping with its sum merged densely."""
        if not isinstance(name, Mapping):
            return super().alone(name)
        key = repr(sorted(name.items()))
        if key not in self.merged:
            self.merged[key] = self._summed(name)
        return self.merged[key]

    @torch.no_grad()
    def _summed(self, weights: Mapping[str, float]) -> nn.Module:
        made = oracle.untied_copy(self.base)
        own, base = made.state_dict(), oracle.untied_copy(self.base).state_dict()
        for name, weight in weights.items():
            other = super().alone(name).state_dict()
            assert other.keys() == own.keys()
            for key, tensor in own.items():
                if tensor.is_floating_point():
                    tensor += weight * (other[key] - base[key])
        return made

    def with_room(self, max_rank: int = 32, max_adapters: int = 6) -> Any:
        """Compiled by the reference lowering, with room for the sum of some ranks."""
        config = lorafx.LoraConfig(max_rank=max_rank, max_adapters=max_adapters)
        options = {"lowering": "reference"}
        return lorafx.compile(self.model(), config, adapters=self.folders, options=options)
