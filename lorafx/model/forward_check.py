"""What a module's forward does with its weight, found by its numbers on one eager call.

    the registered product    forward(x; W) = x Wᵀ + b          or  e · W[ids]
    something more            forward(x; W + D) − forward(x; W) = x Dᵀ     for a random D

Either shows that adding the delta to the output equals adding ΔW to W. The tolerance is wide: it
tells other arithmetic apart, not other rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafx.registry import Kind


def is_dense(weight: Tensor) -> bool:
    """Whether the tensor holds plain numbers: strided, floating, of 16 bits or more."""
    return (
        weight.layout is torch.strided
        and weight.dtype.is_floating_point
        and weight.dtype.itemsize >= 2
    )


@dataclass(frozen=True)
class ModuleProduct:
    """x Wᵀ of one module, or W[ids] times `scale`; `transposed`: W is kept as (K, N)."""

    kind: Kind
    weight_name: str
    transposed: bool
    scale: Tensor | float | None = None

    def of(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x (…, K) or ids (…) with `weight` instead of W, (…, N)."""
        if self.kind == "embedding":
            y = F.embedding(x.long(), weight)
            return y if self.scale is None else y * self.scale
        return F.linear(x.to(weight.dtype), weight.T if self.transposed else weight, bias)


@torch.no_grad()
def adds_up(
    product: ModuleProduct,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    output: Any,
) -> bool:
    """Whether ΔW adds its product with x to the first output of `module`, and changes no other. A
    single output of quantised weights passes."""
    several = isinstance(output, tuple)
    weight = getattr(module, product.weight_name, None)
    if not isinstance(weight, Tensor) or not is_dense(weight) or weight.is_meta:
        return not several
    # Ids outside the vocabulary would raise; they are not ids of this table.
    is_id = product.kind == "embedding" and x.numel() > 0
    if is_id and not 0 <= int(x.min()) <= int(x.max()) < len(weight):
        return False
    bias = getattr(module, "bias", None)
    if not several and _close(output, product.of(weight, x, bias), weight.dtype):
        return True
    if product.weight_name not in module._parameters:
        return False  # computed from other parameters; there is none to put another in place of
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device)
    other = (noise * weight.float().std()).to(weight.dtype)
    with _holding(module, product.weight_name, weight + other):
        changed = module.forward(*args, **kwargs)
    before, after = (output, changed) if several else ((output,), (changed,))
    if len(before) != len(after):
        return False
    difference = after[0].float() - before[0].float()
    return _close(difference, product.of(other, x), weight.dtype) and all(
        _same(old, new) for old, new in zip(before[1:], after[1:], strict=True)
    )


@contextmanager
def _holding(module: nn.Module, name: str, weight: Tensor) -> Iterator[None]:
    kept = module._parameters[name]
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = kept


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    if found.shape != expected.shape:
        return False
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    bound = tolerance * max(1e-6, float(expected.abs().max())) if expected.numel() else 0.0
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=bound)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or bool(a == b)
