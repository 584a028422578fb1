"""A weight of an adapter's own that is a function of the base's, W′ = f(W).

What is no product of small factors is served so: the file's tensors are kept, and W′ is computed
from the current W when the adapter gets a slot. Where a `Structure` says what changes, a slot has
its few numbers instead of W′.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.ops.own_rows import (
    KRONECKER,
    SCALED_PAIR,
    SHIFTED_OUTPUT,
    TURNED_INPUT,
    TURNED_OUTPUT,
    Structure,
)
from lorafx.model.bank import SharedPair


class ChangedWeight(NamedTuple):
    """W′ (N, K) of a linear as a function of W (N, K).

    Attributes:
        of: gets W and `tensors`, on its device; floating-point ones in its dtype, float32 or wider.
        tensors: what the file has for it, and what was computed of that.
        out_features, in_features: N and K; None where any fits.
        bias: gets the base's bias (N,), W and `tensors`, and gives the adapter's; None where that
            is the base's.
        structure: of the change, whose numbers are the first of `tensors`.
        adds: W′ − W, and what is added to the bias, are the same for all W.
        pair: what the structure scales, if it does.
        misfit: gets N, K and `tensors`, and says why they are for no such W, "" if they are.
    """

    of: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()
    out_features: int | None = None
    in_features: int | None = None
    bias: Callable[..., Tensor] | None = None
    structure: Structure | None = None
    adds: bool = False
    pair: SharedPair | None = None
    misfit: Callable[..., str] | None = None

    @classmethod
    def structured(cls, structure: Structure, numbers: Tensor) -> ChangedWeight:
        """`numbers` of any shape; those of one block serve for all."""
        of = partial(_structured, structure=structure)
        bias = None
        if structure.form in (TURNED_OUTPUT, SHIFTED_OUTPUT):
            bias = partial(_structured_bias, structure=structure)
        adds = structure.form in (KRONECKER, SHIFTED_OUTPUT)
        return cls(of, (numbers.flatten(),), bias=bias, structure=structure, adds=adds)

    @classmethod
    def scaled_pair(cls, d: Tensor, b: Tensor, pair: SharedPair) -> ChangedWeight:
        """W′ = W + diag(b) B diag(d) A of the pair (A, B), d (R,) and b (N,)."""
        of, structure = partial(_with_pair, pair=pair), Structure(SCALED_PAIR, len(d), 1)
        numbers = torch.cat((d, b))
        return cls(of, (numbers,), len(b), structure=structure, adds=True, pair=pair)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, any K) and B (N, R) whose product a pair's change is."""
        assert self.pair is not None
        return _scaled(self.pair, *self._scales())

    def on(self, pair: SharedPair) -> ChangedWeight:
        """The same of an equal pair."""
        return ChangedWeight.scaled_pair(*self._scales(), pair)

    def _scales(self) -> tuple[Tensor, Tensor]:
        (numbers,), structure = self.tensors, self.structure
        assert structure is not None
        return numbers[: structure.first], numbers[structure.first :]

    def times(self, weight: float) -> ChangedWeight:
        """`weight` times the change, which `adds`."""
        if self.structure is None:
            bias = None if self.bias is None else partial(_times, of=self.bias, weight=weight)
            return self._replace(of=partial(_times, of=self.of, weight=weight), bias=bias)
        (numbers,) = self.tensors
        first = self.structure.first * self.structure.second or len(numbers)
        scaled = torch.cat((numbers[:first].float() * weight, numbers[first:].float()))
        return self._replace(tensors=(scaled,))

    def plus(self, other: ChangedWeight) -> ChangedWeight:
        """Both changes, which add, as W′ without a structure."""
        parts = self, other
        biased = any(part.bias is not None for part in parts)
        return ChangedWeight(
            partial(_with_both, parts=parts),
            bias=partial(_bias_of_both, parts=parts) if biased else None,
            adds=True,
        )

    def numbers(self, rows: int, columns: int) -> Tensor:
        """Those of its structure for a weight of this size, in one dimension."""
        assert self.structure is not None
        (numbers,) = self.tensors
        return numbers.repeat(self.structure.numbers(rows, columns) // max(1, len(numbers)))

    def why_not(self, out_features: int, in_features: int) -> str:
        """Why it is for no weight of this size, "" if it is."""
        needed, sizes = (self.out_features, self.in_features), (out_features, in_features)
        if any(n not in (None, size) for n, size in zip(needed, sizes, strict=True)):
            return (
                f"which needs to be ({', '.join('any' if n is None else str(n) for n in needed)})"
            )
        return "" if self.misfit is None else self.misfit(*sizes, *self.tensors)

    def fitted(self, out_features: int, in_features: int, *, made: bool) -> ChangedWeight:
        """For a weight of this size, without a structure that would take more room than W′, or
        turn inputs of a weight that is `made` in each call. Raises ValueError for another size."""
        if why := self.why_not(out_features, in_features):
            raise ValueError(why)
        rows = self.rows(out_features, in_features)
        turned = self.structure is not None and self.structure.form == TURNED_INPUT
        return self._replace(structure=None) if rows > out_features or (made and turned) else self

    def rows(self, out_features: int, in_features: int) -> int:
        """How many rows of such a weight hold it."""
        if self.structure is None:
            return out_features
        return -(-self.structure.numbers(out_features, in_features) // in_features)

    def weight(self, base: Tensor) -> Tensor:
        """W′ of a base weight W (N, K) of float32 or wider."""
        return self.of(base, *self._like(base))

    def own_bias(self, base: Tensor, weight: Tensor) -> Tensor:
        """The bias (N,) beside W′, of the base's bias and W."""
        return base if self.bias is None else self.bias(base, weight, *self._like(base))

    def _like(self, base: Tensor) -> list[Tensor]:
        dtypes = (base.dtype if t.is_floating_point() else t.dtype for t in self.tensors)
        return [t.to(base.device, dtype) for t, dtype in zip(self.tensors, dtypes, strict=True)]


def _with_both(weight: Tensor, *, parts: tuple[ChangedWeight, ...]) -> Tensor:
    return weight + sum(part.weight(weight) - weight for part in parts)


def _bias_of_both(bias: Tensor, weight: Tensor, *, parts: tuple[ChangedWeight, ...]) -> Tensor:
    return bias + sum(part.own_bias(bias, weight) - bias for part in parts)


def _times(base: Tensor, *tensors: Tensor, of: Callable[..., Tensor], weight: float) -> Tensor:
    return base + weight * (of(base, *tensors) - base)


def _with_pair(weight: Tensor, numbers: Tensor, *, pair: SharedPair) -> Tensor:
    n, k = weight.shape
    like = SharedPair(pair.A[:, :k].to(weight), pair.B[:n].to(weight))
    a, b = _scaled(like, numbers[: len(pair.A)], numbers[len(pair.A) :])
    return weight + b @ a


def _scaled(pair: SharedPair, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return d[:, None] * pair.A, b[:, None] * pair.B[: len(b)]


def _structured(weight: Tensor, numbers: Tensor, *, structure: Structure) -> Tensor:
    return structure.of_weight(numbers, weight)


def _structured_bias(
    bias: Tensor, weight: Tensor, numbers: Tensor, *, structure: Structure
) -> Tensor:
    return structure.of_weight(numbers, bias)
