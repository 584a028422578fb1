"""Positions along a dimension that was cut, reversed or joined, as runs with symbolic ends.

    Runs(RowRun(s, n, t), ...)    s, s + t, ..., s + t·(n - 1) of each run, one run after the other

A run of step 0 repeats one position: n rows of one request. `NOBODY` is the position of rows that
belong to no request, in a buffer that is not filled yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from lorafx.ownership.symbolic import ONE, divide, equal, never_negative

NOBODY = sympy.Integer(-1)


@dataclass(frozen=True)
class RowRun:
    start: sympy.Expr
    size: sympy.Expr
    step: sympy.Expr = ONE

    def at(self, index: sympy.Expr) -> sympy.Expr:
        return self.start + self.step * index

    def and_then(self, other: RowRun) -> RowRun | None:
        """The run of both, if there is one; a single position has any step."""
        if (self.start == NOBODY) != (other.start == NOBODY):
            return None
        if self.size == other.size == 1:
            return RowRun(self.start, self.size + 1, other.start - self.start)
        step = other.step if self.size == 1 else self.step
        alike = other.size == 1 or other.step == step
        follows = alike and self.start + step * self.size == other.start
        return RowRun(self.start, self.size + other.size, step) if follows else None


@dataclass(frozen=True)
class Runs:
    """The position of each row, for `Own.perm`."""

    runs: tuple[RowRun, ...]

    @property
    def name(self) -> str:
        return ", ".join(f"{run.size} from {run.start} by {run.step}" for run in self.runs)

    @property
    def size(self) -> sympy.Expr:
        return sympy.Add(*(run.size for run in self.runs))

    @property
    def complete(self) -> bool:
        """Whether each row is a request's."""
        return all(run.start != NOBODY for run in self.runs)

    @staticmethod
    def joined(parts: Iterable[Runs]) -> Runs:
        """The positions of one part after the other; runs that continue each other are one."""
        found: list[RowRun] = []
        for run in (run for part in parts for run in part.runs if run.size != 0):
            longer = found[-1].and_then(run) if found else None
            found[-1:] = [longer] if longer is not None else [*found[-1:], run]
        return Runs(tuple(found))

    def reversed(self) -> Runs:
        """The positions from the last to the first."""
        return Runs(tuple(RowRun(r.at(r.size - 1), r.size, -r.step) for r in self.runs[::-1]))

    def scaled(self, m: sympy.Expr) -> Runs | None:
        """The positions when m entries take the place of each one; None if those are no runs."""
        if not self.complete or any(run.step not in (0, 1) for run in self.runs):
            return None
        return Runs(tuple(RowRun(run.start * m, run.size * m, run.step) for run in self.runs))

    def grouped(self, m: sympy.Expr, rows: sympy.Expr) -> tuple[sympy.Expr, Runs] | None:
        """(rows, positions) when one entry takes the place of m that follow each other, all of one
        request of `rows` positions; None if that is not known."""
        still = all(run.step == 0 for run in self.runs)
        found: list[RowRun] = []
        for run in self.runs:
            start, size = divide(run.start, rows if still else m), divide(run.size, m)
            if start is None or size is None or run.step not in (0, 1) or not self.complete:
                return None
            found.append(RowRun(start, size, run.step))
        left = ONE if still else divide(rows, m)
        return None if left is None else (left, Runs(tuple(found)))

    def part(self, start: sympy.Expr, size: sympy.Expr, step: sympy.Expr = ONE) -> Runs | None:
        """Entries start, start + step, ..., `size` in number; None if it is not known in which runs
        they are."""
        if len(self.runs) == 1:
            (run,) = self.runs
            return Runs((RowRun(run.at(start), size, run.step * step),))
        found, left = [], size
        for run in self.runs:
            if left == 0:
                break
            if start == 0 and never_negative(left - run.size):
                taken = run.size
            elif never_negative(run.size - start - left):
                taken = left
            elif equal(start, run.size) or never_negative(start - run.size):
                start = start - run.size
                continue
            elif never_negative(left - run.size + start) and never_negative(run.size - start):
                taken = run.size - start
            else:
                return None
            found.append(RowRun(run.at(start), taken, run.step))
            start, left = sympy.S.Zero, left - taken
        return Runs(tuple(found)) if left == 0 and step == ONE else None
