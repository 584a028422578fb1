"""Labels: which request the entries of a tensor belong to.

With B requests in the batch, a tensor t has one of the labels

    None                   t depends on no request (weights, position tables, iotas)
    Own(dim, rows, perm)   t[..., i, ...] (i along `dim`) depends on one request only, namely
                           ((perm[i] if perm else i) // rows) mod B; perm is a vector of the graph,
                           or what is known of positions without one (`Runs`)
    One(request)           t depends on this request only
    Pooled()               entries of all requests, of which a mask shows each query its own
    Mixed(reason)          nothing is proved

Without perm the size of an owned dimension is a whole number of periods rows·B. Labels are
canonical (`dim` is not negative, `rows` is a positive sympy expression), so equal labels are equal
maps. Labels state ownership, not information flow: a router that sorts the tokens of all requests
together only moves rows (`perm`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
from torch import fx

from lorafx.ownership.runs import Runs


@dataclass(frozen=True)
class Own:
    """Index i along `dim` belongs to request ((perm[i] if perm else i) // rows) mod B."""

    dim: int
    rows: sympy.Expr = sympy.S.One
    perm: fx.Node | Runs | None = None

    def at(self, dim: int) -> Own:
        return replace(self, dim=dim)

    def __str__(self) -> str:
        each = "" if self.rows == 1 else f", {self.rows} rows each"
        order = "" if self.perm is None else f", in the order of {self.perm.name}"
        return f"the requests along dimension {self.dim}{each}{order}"


@dataclass(frozen=True)
class One:
    """The whole tensor belongs to this request of the batch."""

    request: int

    def __str__(self) -> str:
        return f"request {self.request}"


@dataclass(frozen=True)
class Pooled:
    """A paged cache's keys or values of all requests; a mask restricts each query."""

    def __str__(self) -> str:
        return "keys or values of all requests"


@dataclass(frozen=True)
class Mixed:
    """Nothing is proved; `reason` names where the proof was lost."""

    reason: str

    def __str__(self) -> str:
        return f"Mixed({self.reason})"


@dataclass(frozen=True)
class Digit:
    """The *values* of an integer tensor t as a digit of the position.

        t[..., i, ...] = ((perm[i] if perm else i) // rows) mod modulus      (i along `dim`)

    An iota of n entries is Digit(0, 1, n); the indices p of a 1-D sort of n entries are Digit(0, 1,
    n, p), and p // k is Digit(0, k, n/k, p). An `Own` label is the same arithmetic with modulus B:
    indexing composes the two.
    """

    dim: int
    rows: sympy.Expr
    modulus: sympy.Expr
    perm: fx.Node | None = None

    def at(self, dim: int) -> Digit:
        return replace(self, dim=dim)


# The label of a tensor, and of a node: a tuple for several outputs.
Single: TypeAlias = Own | One | Pooled | Mixed | None
Label: TypeAlias = Single | tuple[Single, ...]
