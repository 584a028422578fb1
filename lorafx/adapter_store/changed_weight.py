"""A weight of an adapter's own that is a function of the base's, W′ = f(W).

What is no product of small factors is served so: the file's tensors are kept, and W′ is computed
from the current W when the adapter gets a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class ChangedWeight(NamedTuple):
    """W′ (N, K) of a linear as a function of W (N, K).

    Attributes:
        of: gets W and `tensors`, on its device; floating-point ones in its dtype, float32 or wider.
        tensors: what the file has for it, and what was computed of that.
        out_features, in_features: N and K; None where any fits.
        bias: gets the base's bias (N,), W and `tensors`, and gives the adapter's; None where that
            is the base's.
    """

    of: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()
    out_features: int | None = None
    in_features: int | None = None
    bias: Callable[..., Tensor] | None = None

    def weight(self, base: Tensor) -> Tensor:
        """W′ of a base weight W (N, K) of float32 or wider."""
        return self.of(base, *self._like(base))

    def own_bias(self, base: Tensor, weight: Tensor) -> Tensor:
        """The bias (N,) beside W′, of the base's bias and W."""
        return base if self.bias is None else self.bias(base, weight, *self._like(base))

    def _like(self, base: Tensor) -> list[Tensor]:
        dtypes = (base.dtype if t.is_floating_point() else t.dtype for t in self.tensors)
        return [t.to(base.device, dtype) for t, dtype in zip(self.tensors, dtypes, strict=True)]
