"""Exact arithmetic on symbolic sizes, with a single symbol for the batch and division by
cancellation.

Sizes are read from fake tensors (`SymInt.node.expr`), never from hints, so proofs hold for every
call. An expression is kept as integer · ∏ baseᵉ, and a / b exists only where every factor of b
cancels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from torch import fx

from lorafx.errors import ProvenanceError
from lorafx.torch_internals.graph_parts import FloorDiv, statically_known_true

Shape = tuple[sympy.Expr, ...]
ONE = sympy.Integer(1)


@dataclass(frozen=True)
class BatchSymbols:
    """Symbols and integers that equal the number of requests B, which is checked at entry.

    `canonical` is the member that stands for all: the number, if there is one. `multiples` are
    whole multiples of B; the sizes in `alike` equal each other.
    """

    members: frozenset[sympy.Expr]
    multiples: frozenset[sympy.Expr] = frozenset()
    alike: frozenset[sympy.Expr] = frozenset()

    @staticmethod
    def of(
        sizes: Iterable[int | torch.SymInt | sympy.Expr],
        multiples: Iterable[int | torch.SymInt] = (),
        alike: Iterable[int | torch.SymInt] = (),
    ) -> BatchSymbols:
        """From the sizes of dimensions of requests: symbols and at most one integer."""
        members = frozenset(as_expr(size) for size in sizes)
        numbers = {m for m in members if m.is_Integer}
        odd = [m for m in members if not (m.is_Integer or m.is_Symbol)]
        if odd or len(numbers) > 1 or not members:
            raise ProvenanceError(
                f"the batch has sizes {sorted(map(str, members))}: expected symbols and at most "
                "one number, all equal to the number of requests"
            )
        known = (frozenset(map(as_expr, sizes)) - members for sizes in (multiples, alike))
        return BatchSymbols(members, *known)

    @property
    def canonical(self) -> sympy.Expr:
        numbers = [m for m in self.members if m.is_Integer]
        return numbers[0] if numbers else min(self.members, key=str)

    def share(self, size: int | torch.SymInt) -> sympy.Expr:
        return FloorDiv(as_expr(size), self.canonical)

    @property
    def is_one(self) -> bool:
        return self.canonical == ONE


def as_expr(size: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    if isinstance(size, sympy.Expr):
        return size
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Sizes:
    """A graph's sizes as expressions with a single batch symbol."""

    def __init__(self, batch: BatchSymbols) -> None:
        self.batch = batch.canonical
        self._unify = {m: self.batch for m in batch.members if m != self.batch}
        self._unify |= {m: self.batch * batch.share(m) for m in batch.multiples if m.is_Symbol}
        if batch.alike:
            same = min(batch.alike, key=lambda size: (not size.is_Integer, str(size)))
            self._unify |= {size: same for size in batch.alike if size.is_Symbol and size != same}
        self._learnt: dict[sympy.Expr, sympy.Expr] = {}
        self._memo: dict[sympy.Expr, sympy.Expr] = {}
        #: Sizes that are sums or quotients, by their expressions.
        self._composed: dict[sympy.Expr, int | torch.SymInt] = {}
        #: By identity; tensors and their shapes, which rules read repeatedly.
        self._shapes: dict[int, tuple[torch.Tensor, Shape]] = {}

    def of(self, size: object) -> sympy.Expr | None:
        """An int, SymInt or node with such a value, as an expression; else None."""
        if isinstance(size, fx.Node):
            size = size.meta.get("val")
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            return None
        return self.unify(as_expr(size))

    def unify(self, expr: sympy.Expr) -> sympy.Expr:
        if expr.is_Integer:
            return expr
        if expr not in self._memo:
            known = expr.xreplace(self._unify)
            while self._learnt:
                simpler = known.xreplace(self._learnt)
                if simpler == known:
                    break
                known = simpler
            self._memo[expr] = known
        return self._memo[expr]

    def learn(self, size: sympy.Expr, same: sympy.Expr) -> None:
        """Replace `size` by the equal `same` everywhere, if that has fewer operations or fixes a
        symbol: B·H = 4·B means H = 4."""
        if size == same or size.is_Integer:
            return
        if same.count_ops() >= size.count_ops():
            factor, number = divide(size, self.batch), divide(same, self.batch)
            if factor is None or not factor.is_Symbol or number is None or not number.is_Integer:
                return
            size, same = factor, number
        self._learnt[size] = same
        self._memo.clear()
        self._shapes.clear()

    def shape(self, value: torch.Tensor) -> Shape:
        known = self._shapes.get(id(value))
        if known is None:
            found = tuple(self.unify(as_expr(size)) for size in value.shape)
            known = self._shapes[id(value)] = value, found
        return known[1]

    def compare(self, value: torch.Tensor) -> None:
        """Learn which of the tensor's sizes are earlier ones in other words, by what torch has
        guarded on: with an even s, s // 2 of a view is (s − 1) // 2 + 1 of a convolution."""
        for size in value.shape:
            expr = as_expr(size)
            if not (expr.is_Add or isinstance(expr, FloorDiv)) or expr in self._composed:
                continue
            for other, same in self._composed.items():
                if statically_known_true(size == same):
                    pair = self.unify(expr), self.unify(other)
                    self.learn(*sorted(pair, key=sympy.count_ops, reverse=True))
            self._composed[expr] = size

    def strides(self, value: torch.Tensor) -> Shape:
        return tuple(self.unify(as_expr(stride)) for stride in value.stride())


@lru_cache(maxsize=65536)
def factors(expr: sympy.Expr) -> tuple[int, dict[sympy.Expr, int]]:
    """expr as (integer, {base: positive exponent}), with sums factored if possible."""
    if expr.is_Integer:
        return int(expr), {}
    if expr.is_Mul:
        return _multiplied(factors(arg) for arg in expr.args)
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        number, bases = factors(expr.base)
        power = int(expr.exp)
        return number**power, {base: e * power for base, e in bases.items()}
    if expr.is_Add:
        whole = sympy.factor(expr)
        if whole.is_Mul or whole.is_Pow:
            return factors(whole)
    if isinstance(expr, FloorDiv):
        whole, by = expr.args
        exact = divide(whole, by)
        if exact is None:  # rounded up, as the number of steps of an iota
            exact = divide(sympy.expand(whole - by + 1), by)
        if exact is not None:
            return factors(exact)
    return 1, {expr: 1}


def _multiplied(parts: Iterable[tuple[int, dict]]) -> tuple[int, dict[sympy.Expr, int]]:
    number = 1
    bases: dict[sympy.Expr, int] = {}
    for n, part in parts:
        number *= n
        for base, exponent in part.items():
            bases[base] = bases.get(base, 0) + exponent
    return number, bases


@lru_cache(maxsize=65536)
def divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b where it is provably an integer for all values of the symbols, else None."""
    if b == ONE:
        return a
    if a == b:
        return ONE if b != 0 else None
    (na, fa), (nb, fb) = factors(a), factors(b)
    if nb == 0 or na % nb:
        return None
    if na == 0:
        return sympy.S.Zero
    exponents = dict(fa)
    for base, exponent in fb.items():
        left = exponents.get(base, 0) - exponent
        if left < 0:
            return None
        exponents[base] = left
    return sympy.Mul(na // nb, *(base**e for base, e in exponents.items() if e))


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    return sympy.Mul(*sizes)


def is_multiple(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether b divides a for all values of the symbols."""
    return divide(a, b) is not None


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a = b for all values of the symbols."""
    return a == b or divide(a, b) == ONE


def never_negative(expr: sympy.Expr) -> bool:
    """Whether no term of the expansion is negative, so expr ≥ 0 for non-negative atoms."""
    atoms = {a: sympy.Dummy(integer=True, nonnegative=True) for a in expr.atoms(sympy.Function)}
    expanded = sympy.expand(expr.xreplace(atoms))
    return all(
        term.as_coeff_Mul()[0] >= 0
        and all(f.is_Symbol or f.is_Pow or f.is_Number for f in sympy.Mul.make_args(term))
        for term in sympy.Add.make_args(expanded)
    )


def reshaped(
    dim: int, rows: sympy.Expr, modulus: sympy.Expr, old: Shape, new: Shape, fixed: bool = False
) -> tuple[int, sympy.Expr] | None:
    """The place of the digit (i_dim // rows) mod modulus of a row-major position in a new shape.

    With F = rows · ∏ old[dim+1:] the digit is (position // F) mod modulus, because old[dim] is a
    whole number of periods. Output dimension e of suffix product P carries it as (i_e // R') mod
    modulus with R' = F / P, when P divides F and modulus·R' divides new[e]. The same in prefix
    products, for shapes whose trailing sizes do not cancel symbolically: R' = rows · ∏ new[:e+1] /
    ∏ old[:dim+1].

    `fixed`: only an unchanged dimension is accepted (its indices go through a table). Returns (e,
    R') or None.
    """
    behind = product(old[dim + 1 :])
    before = product(old[: dim + 1])
    for e, size in enumerate(new):
        after, upto = product(new[e + 1 :]), product(new[: e + 1])
        if fixed:
            kept = equal(size, old[dim])
            if kept and (equal(after, behind) or equal(upto, before)):
                return e, rows
            continue
        for step in (divide(rows * behind, after), divide(rows * upto, before)):
            if step is not None and step != 0 and is_multiple(size, modulus * step):
                return e, step
    return None
