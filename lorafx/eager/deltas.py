"""The deltas of sites in an eager forward.

With few rows a delta is two batched products over factors that are gathered by row,

    v = x Aᵀ        x (n, T, K), A (n, ρ, K), ρ the sum of the parts' ranks
    y ← y + v B     B (n, ρ, N), scaled, zero outside of a part's columns; y − 0 for the base's rows

Gathered factors are kept for the next step, up to a share of the model's bytes, and are gathered
again when a bank has been written. All other deltas are those of the sites' operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.eager.following import Following
from lorafx.eager.known_labels import UNKNOWN as UNKNOWN_CODE
from lorafx.eager.known_labels import WEIGHTS
from lorafx.eager.linear_calls import LinearCall
from lorafx.kernels.ops.delta import accumulation_dtype
from lorafx.model.bank import Bank
from lorafx.model.marks import UNPROVED, Owners, SiteMark
from lorafx.ownership.labels import One
from lorafx.ownership.real_labels import NOBODY, UNKNOWN, Listed, Patchy, RealLabel, settled
from lorafx.ownership.site_rules import row_dims_of
from lorafx.program.program import Program

#: Gathering the factors of more rows takes longer than the site's operator.
_MOST_ROWS = 32


class RowFactors(NamedTuple):
    """Factors by row: A (n, K, ρ), B (n, ρ, N), and which rows are the base's, (n, 1, 1), or None
    if none is; with the versions of the bank that they were read from."""

    A: Tensor
    B: Tensor
    base: Tensor | None
    versions: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes


class GatheredFactors:
    """The factors that calls of a program have gathered, at most `most` bytes of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[tuple[str, tuple[int, ...]], RowFactors] = {}
        self._nbytes = 0

    def of(self, mark: SiteMark, slots: tuple[int, ...], dtype: torch.dtype) -> RowFactors | None:
        """The factors of rows with these slots; None if they would be too large."""
        bank, key = mark.bank, (mark.path, slots)
        versions = _versions(bank)
        kept = self._kept.get(key)
        if kept is not None and kept.versions == versions and kept.A.dtype == dtype:
            return kept
        ranks = {slot: [int(r) for r in bank.ranks[slot]] for slot in set(slots) if slot >= 0}
        rank = max((sum(r[i] for i in mark.siblings) for r in ranks.values()), default=0)
        nbytes = len(slots) * rank * (mark.in_features + mark.out_features) * dtype.itemsize
        self._drop([key])
        if self._nbytes + nbytes > self._most:
            self._drop([other for other in self._kept if other[1] != slots])
        if self._nbytes + nbytes > self._most:
            return None
        factors = self._kept[key] = _gathered(mark, slots, ranks, rank, dtype, versions)
        self._nbytes += factors.nbytes
        return factors

    def _drop(self, keys: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        for key in keys:
            if key in self._kept:
                self._nbytes -= self._kept.pop(key).nbytes


def _versions(bank: Bank) -> tuple[int, ...]:
    return (bank.A._version, bank.B._version, bank.ranks._version, bank.scales._version)


def _gathered(
    mark: SiteMark,
    slots: tuple[int, ...],
    ranks: dict[int, list[int]],
    rank: int,
    dtype: torch.dtype,
    versions: tuple[int, ...],
) -> RowFactors:
    bank, features, distinct = mark.bank, mark.in_features, list(dict.fromkeys(slots))
    shape = len(distinct), rank
    A = bank.A.new_zeros((*shape, features), dtype=dtype)
    B = bank.B.new_zeros((*shape, mark.out_features), dtype=dtype)
    for row, slot in enumerate(distinct):
        first = start = 0
        for i, offset, size in zip(mark.siblings, mark.offsets, mark.sizes, strict=True):
            r = ranks[slot][i] if slot >= 0 else 0
            if r:  # rows beyond it may be another adapter's
                A[row, first : first + r] = bank.A[slot, :r, i * features : (i + 1) * features]
                columns = bank.B[slot, :r, offset : offset + size].to(dtype)
                B[row, first : first + r, start : start + size] = columns * bank.scales[slot, i]
            first, start = first + r, start + size
    index = torch.tensor([distinct.index(slot) for slot in slots], device=A.device)
    base = torch.tensor([slot < 0 for slot in slots], device=A.device)[:, None, None]
    A = A[index].transpose(1, 2).contiguous()
    return RowFactors(A, B[index], None if min(slots) >= 0 else base, versions)


class RowDeltas:
    """Adds the deltas of one eager forward (`Runtime.deltas`). With `sites`, outputs are noted
    there, and all deltas are those of the sites' operators, as in a graph."""

    def __init__(
        self,
        program: Program,
        following: Following,
        gathered: GatheredFactors,
        sites: list[tuple[str, Tensor]] | None = None,
    ) -> None:
        self._following, self._gathered, self._sites = following, gathered, sites
        self._touched = program.batch.touched
        self._rows, self._uniform = program.runtime.rows, program.runtime.uniform
        #: Slots by row, by the code of x and its row dimensions.
        self._by_code: dict[tuple[int, tuple[int, ...]], RowLayout] = {}
        #: Results of `linear` whose marks have not come yet, by path.
        self._added: dict[str, Tensor] = {}
        #: The state of the last x, and itself in a wider dtype: others may share it.
        self._widened: tuple[object, Tensor] | None = None

    def add(
        self,
        mark: SiteMark,
        x: Tensor,
        y: Tensor,
        scale: Tensor | float | None,
        ranges: Sequence[Sequence[int]],
        addend: Tensor | None = None,
        base: Tensor | Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """y with the delta of the site's columns `ranges`. Raises NeedsGraph if the owners of rows
        are not known."""
        following = self._following
        if self._added.pop(mark.path, None) is not None:
            following.refuse(f"{mark.path}: its call does not return what its forward has")
        following.marked(mark, x, y)
        if mark.path not in self._touched or not y.numel():
            return self._noted(mark, y)

        def added() -> Tensor:
            code = following.code(x)
            agree = following.code(y) == code
            if self._uniform:
                rows = RowLayout((self._rows[0],), 1)
                code = code if agree and code > WEIGHTS else UNKNOWN_CODE  # an adapter changes it
            elif agree:
                rows = self._rows_of(mark, code, x)
            else:
                following.refuse(f"{mark.path}: the rows of its output are not those of its input")
            out = None
            few = self._sites is None and rows.few
            if scale is None and mark.is_plain and ranges[2] is mark.sizes and few:
                out = y.clone(memory_format=torch.contiguous_format)
                out = out if self._add_products(mark, x, out, rows.slots) else None
            if out is None:
                slots = torch.tensor(rows.slots, dtype=torch.int32, device=y.device)
                owners = Owners(slots, UNPROVED if len(rows.slots) == 1 else rows.each)
                out = mark.with_delta(x, y, scale, ranges, addend, base, owners)
            following.note(out, following.settled(code))
            return self._noted(mark, out)

        return following.outside(added)

    def has_added(self, mark: SiteMark, y: Any) -> bool:
        """Whether y, the output of the mark's module, is the last result of `linear` for it."""
        if self._added.get(mark.path) is not y:
            return False
        del self._added[mark.path]
        return True

    def linear(self, call: LinearCall, x: Tensor) -> Tensor | None:
        """What a known linear returns for x, with its delta where `call` has a mark; None if it has
        to be followed."""
        following, mark = self._following, call.mark
        if not following.on_top or call.module._parameters.get("weight") is not call.weight:
            return None
        without = mark is None or mark.stored  # the product may stand alone: the mark adds the rest

        def product() -> Tensor | None:
            code = following.code(x)
            if not self._leads(x):
                return None
            rows = None if mark is None else self._few(code, x)
            if rows is None and not without:
                return None
            y = call.original(x)
            if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
                return None  # the mark says what is wrong
            added = False
            if mark is not None and rows is not None and y.shape[-1] == mark.out_features:
                y = y.contiguous()
                added = self._add_products(mark, x, y, rows.slots)
            if not (added or without):
                return None
            following.note(y, following.settled(code) if added else code)
            if added and mark is not None:
                following.marked_alone(mark)
                self._added[mark.path] = y
            return y

        return following.outside(product)

    @property
    def on_top(self) -> bool:
        """Whether the operators that run now are followed."""
        return self._following.on_top

    def _leads(self, x: Tensor) -> bool:
        """Whether rows of x, all its dimensions but the last, have one owner each."""
        label = self._following.label(x)
        return isinstance(label, One) or (isinstance(label, Listed) and label.dim < x.dim() - 1)

    def _few(self, code: int, x: Tensor) -> RowLayout | None:
        """The slots of the rows of x, if they are few and those of each slot lie together."""
        rows = self._leading(code, x)
        return rows if rows is not None and rows.few else None

    def _leading(self, code: int, x: Tensor) -> RowLayout | None:
        """The slots of the rows of x, all its dimensions but the last; None if not known."""
        if self._uniform:
            return RowLayout((self._rows[0],), 1)
        return self._rows_by_code(code, tuple(x.shape[:-1]), x)

    def outside(self, action: Callable[[], bool]) -> bool:
        """The result of `action`, whose operators are not followed."""
        return self._following.outside(action)

    def _noted(self, mark: SiteMark, out: Tensor) -> Tensor:
        if self._sites is not None:
            self._sites.append((mark.path, out.clone()))
        return out

    def _add_products(self, mark: SiteMark, x: Tensor, y: Tensor, slots: tuple[int, ...]) -> bool:
        """Add the delta to y, which is contiguous. Returns False if its factors are too large."""
        acc = accumulation_dtype(x, y)
        factors = self._gathered.of(mark, slots, acc)
        if factors is None:
            return False
        n, x = len(slots), self._wide(x, acc)
        if n == 1:
            delta = (x.reshape(-1, x.shape[-1]) @ factors.A[0]) @ factors.B[0]
        else:
            delta = torch.bmm(torch.bmm(x.reshape(n, -1, x.shape[-1]), factors.A), factors.B)
            if factors.base is not None:  # 0 times infinity is no number, and y + -0 has y's bits
                delta.masked_fill_(factors.base, -0.0)
        y.view(delta.shape).add_(delta)
        return True

    def _wide(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        state = self._following.state(x)
        if self._widened is not None and state is not None:
            last, wide = self._widened
            if last is state and wide.dtype == dtype:
                return wide
        wide = x.to(dtype)
        self._widened = state, wide
        return wide

    def _rows_of(self, mark: SiteMark, code: int, x: Tensor) -> RowLayout:
        lead = tuple(x.shape[: row_dims_of(mark.kind, x.dim())])
        found = self._rows_by_code(code, lead, x)
        if found is None:
            self._following.refuse(
                f"{mark.path}: which request each row of its input belongs to is not known"
            )
        return found

    def _rows_by_code(self, code: int, lead: tuple[int, ...], x: Tensor) -> RowLayout | None:
        found = self._by_code.get((code, lead))
        if found is None:
            found = self._slots(self._following.label(x), lead, x)
            if found is not None:
                self._by_code[code, lead] = found
        return found

    def _slots(self, label: RealLabel | None, lead: tuple[int, ...], x: Tensor) -> RowLayout | None:
        label = settled(label)
        if isinstance(label, One):
            return RowLayout((self._rows[label.request],), 1)
        if isinstance(label, Listed) and label.dim < len(lead):
            if NOBODY in label.owners:  # in a graph they are copies for each request
                return None
            slots = tuple(self._rows[owner] for owner in label.owners)
            each, times = math.prod(lead[label.dim + 1 :]), len(slots) // len(self._rows)
            if times > 1 and slots == tuple(s for s in slots[::times] for _ in range(times)):
                slots, each = slots[::times], each * times
            return RowLayout(slots, each, leads=math.prod(lead[: label.dim]) == 1)
        if isinstance(label, Patchy):
            cells = label.cells.expand(x.shape).reshape(math.prod(lead), -1)
            owners = cells.amax(1, keepdim=True)
            mixed = (cells != owners) & (cells != NOBODY)
            if bool((cells == UNKNOWN).any() | mixed.any() | (owners == NOBODY).any()):
                return None
            return RowLayout(tuple(self._rows[owner] for owner in owners.flatten().tolist()), 1)
        return None


@dataclass(frozen=True)
class RowLayout:
    """Row m has slot slots[(m // each) % n]. `leads`: the rows of each slot lie together."""

    slots: tuple[int, ...]
    each: int
    leads: bool = True

    @property
    def few(self) -> bool:
        """Whether their factors are gathered by row."""
        return self.leads and len(self.slots) <= _MOST_ROWS
