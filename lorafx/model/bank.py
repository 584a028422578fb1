"""The bank: the low-rank factors of all slots of one group, at fixed addresses.

    delta_i(x) = scales[s, i] · (x A[s, :r, i·K : (i + 1)·K]ᵀ) B[s, :r, offset_i : offset_i + N_i]
    y ← c + (1 + gains[s, n]) · (y − c)     with room for DoRA, c the module's bias
    y ← y + shifts[s]                        with room for biases
    W ← own[s]                               with room for replaced weights

with s the row's slot and r = ranks[s, i]. Rows with slot -1 are base rows. Factors beyond a slot's
rank are never read.

Slots may share memory: slot s begins p rows behind slot s − 1 in A and in B, p ≤ R, and an adapter
of rank r > p extends into the following slots. It takes ⌈r / p⌉ consecutive slots, and the bank has
memory for (S − 1)·p + R rows.

A bank for E experts has E·S slots: slot s of expert e is its slot e·S + s, and a row that was
routed to an expert is a row of that slot. Where slots share memory, S includes ⌈R / p⌉ − 1 slots
that no adapter gets, into which the last slot of an expert extends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.ops.own_rows import ROWS, OwnRows, Structure


class OwnWeight(NamedTuple):
    """Rows (T, K) of a site's weight that an adapter replaces, of an embedding (T, N), with bias
    (T,) of a linear. `indices`: int32 (T,), ascending, of the replaced rows; None for all rows.
    With a `structure` of a linear's change, `rows` are its numbers, in one dimension."""

    rows: Tensor
    bias: Tensor | None = None
    indices: Tensor | None = None
    structure: Structure | None = None


class SharedPair(NamedTuple):
    """A (R, K) and B (N, R) of the largest K and N, of which each adapter scales rows and columns
    by vectors of its own (VeRA)."""

    A: Tensor
    B: Tensor

    def of(self, in_features: int, out_features: int) -> SharedPair | None:
        """That of a linear of this size, as views; None for a larger one."""
        fits = in_features <= self.A.shape[1] and out_features <= len(self.B)
        return SharedPair(self.A[:, :in_features], self.B[:out_features]) if fits else None

    def equals(self, other: SharedPair) -> bool:
        return all(a is b or torch.equal(a, b) for a, b in zip(self, other, strict=True))


class Factors(NamedTuple):
    """One sibling's factors in the bank's layout, for `Bank.write`.

    A: linear (r, K), embedding (V, r). B: (r, N), the checkpoint's B transposed. With experts: A
    (E, r, K), B (E, r, N), and `ranks` and `scales` (E,), no rank above r. DoRA, float32 (N,): the
    trained `magnitude` m and `gains`, m / ‖W + s·B A‖ − 1. Biases, float32 (N,): lora_B's b is
    `bias`; b', which replaces the base's, is `own_bias`; `shift` is s·b + b' − the base's bias.
    """

    sibling: int
    offset: int
    A: Tensor
    B: Tensor
    scale: float | Tensor
    ranks: Tensor | None = None
    magnitude: Tensor | None = None
    gains: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.B.shape[-2]


@dataclass(frozen=True, eq=False)
class Bank:
    """Factors of S slots for a group of G siblings at rank at most R.

    Attributes:
        A: linear (S, R, G·K), K columns a sibling (K of a convolution: one kernel over all
            channels); embedding (S, V, R).
        B: (S, R, ΣN), N_i columns a sibling.
        ranks, scales: (S, G) int32, float32; rank 0 where the adapter does not touch the sibling.
        alike: (S, G) int32, of `experts` alone: the first sibling with the same A, rank and scale.
        gains, shifts: (S, ΣN) float32, DoRA's scale of each output − 1, and biases; or None.
        own, own_at, own_table, own_bias, pair_a, pair_b: as in OwnRows; or None.
        slot_rank: p; 0 of a part of a bank, which is not written.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    kind: str = "linear"
    experts: int = 1
    alike: Tensor | None = None
    gains: Tensor | None = None
    own: Tensor | None = None
    own_at: Tensor | None = None
    own_table: Tensor | None = None
    own_bias: Tensor | None = None
    pair_a: Tensor | None = None
    pair_b: Tensor | None = None
    shifts: Tensor | None = None
    slot_rank: int = 0

    @classmethod
    def allocate(
        cls,
        *,
        kind: str,
        slots: int,
        rank: int,
        in_features: int,
        out_features: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        experts: int = 1,
        dora: bool = False,
        biases: bool = False,
        own_rows: int = 0,
        own_weights: int = 0,
        own_dtype: torch.dtype | None = None,
        pair: SharedPair | None = None,
        slot_rank: int | None = None,
    ) -> Bank:
        """A bank of zeros, with room for `own_rows` replaced rows for each of `own_weights`
        adapters, and the `pair` that they may scale. Each slot begins `slot_rank` (None: `rank`)
        rows behind the previous one."""
        siblings, columns = len(out_features), sum(out_features)
        step = rank if slot_rank is None else min(slot_rank, rank)
        if experts > 1:  # the last slot of an expert extends into slots of no adapter
            slots = experts * (slots - 1 + -(-rank // step))

        def strided(*shape: int, strides: tuple[int, int, int]) -> Tensor:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()

        def by_rows(width: int) -> Tensor:
            return strided(slots, rank, width, strides=(step * width, width, 1))

        def zeros(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((slots, width), dtype=dtype, device=device)

        # Tensors made in inference mode could not be written in place outside of it.
        with torch.inference_mode(False):
            embedding = kind == "embedding"
            apart = (in_features * rank, rank, 1)
            shared = (step, (slots - 1) * step + rank, 1)
            by_column = apart if step == rank else shared
            rows = (own_weights, own_rows, columns if embedding else in_features)
            room = _room_for_rows(kind, slots, rows, in_features, own_dtype or dtype, device)
            if pair is not None:
                room = room._replace(pair_a=pair.A, pair_b=pair.B)
            sibling = torch.arange(siblings, dtype=torch.int32, device=device)
            return cls(
                A=strided(slots, in_features, rank, strides=by_column)
                if embedding
                else by_rows(siblings * in_features),
                B=by_rows(columns),
                ranks=zeros(siblings, dtype=torch.int32),
                scales=zeros(siblings),
                kind=kind,
                experts=experts,
                slot_rank=step,
                alike=sibling.repeat(slots, 1) if kind == "experts" else None,
                gains=zeros(columns) if dora else None,
                shifts=zeros(columns) if biases else None,
                **room._asdict(),
            )

    @property
    def max_rank(self) -> int:
        return self.B.shape[1]

    def width(self, rank: int) -> int:
        """Adjacent slots that an adapter of this rank takes."""
        return -(-rank // self.slot_rank)

    @property
    def own_rows(self) -> OwnRows:
        return OwnRows(*(getattr(self, name) for name in OwnRows._fields))

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("A", "B", "ranks", "scales")}
        named |= {"alike": self.alike, "gains": self.gains, "shifts": self.shifts}
        named |= self.own_rows._asdict()
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def room(self) -> tuple[str, ...]:
        """The optional parts that the bank has room for, as reports name them."""
        optional = {
            "DoRA's scales": self.gains,
            "biases": self.shifts,
            "weights of adapters' own": self.own,
        }
        return tuple(name for name, tensor in optional.items() if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Without the pair, which many banks have."""
        total = 0
        for name, tensor in self.tensors.items():
            if name in ("pair_a", "pair_b"):
                continue
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            span = 1 + sum((size - 1) * stride for size, stride in steps)
            total += span * tensor.itemsize if tensor.numel() else 0
        return total

    def tables(self, factors: Sequence[Factors]) -> dict[str, Tensor]:
        """What a slot with `factors` has in `scales`, `alike` and `ranks`, (E, siblings) each, as
        `write` takes it; page-locked for a bank on CUDA."""
        shape = self.experts, self.ranks.shape[1]
        ranks = torch.zeros(shape, dtype=torch.int32, device="cpu")
        scales = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for f in factors:
            ranks[:, f.sibling] = f.rank if f.ranks is None else f.ranks
            scales[:, f.sibling] = f.scale
        tables = {"scales": scales}
        if self.alike is not None:
            tables["alike"] = _first_equal(factors, ranks, scales)
        tables["ranks"] = ranks
        return {n: t.pin_memory() for n, t in tables.items()} if self.ranks.is_cuda else tables

    @torch.no_grad()
    def write(
        self,
        slot: int,
        factors: Sequence[Factors],
        tables: Mapping[str, Tensor],
        weight: OwnWeight | None = None,
        place: int = 0,
    ) -> list[Tensor]:
        """Write `factors` and their `tables` into `slot`, and `weight` into `place` of the replaced
        rows. CUDA copies are only launched: neither arguments nor results, their sources, may
        change meanwhile."""
        step = len(self.ranks) // self.experts
        slots = slice(slot, slot + 1 + (self.experts - 1) * step, step)
        for f in factors:
            columns = slice(f.offset, f.offset + f.B.shape[-1])
            self._sibling_a(slots, f.sibling, f.rank).copy_(f.A, non_blocking=True)
            self.B[slots, : f.rank, columns].copy_(f.B, non_blocking=True)
        for name, table in tables.items():
            getattr(self, name)[slots].copy_(table, non_blocking=True)
        sources = self.write_by_column(slot, factors)
        return sources + self.write_rows(slot, weight, place)

    @torch.no_grad()
    def write_by_column(self, slot: int, factors: Sequence[Factors]) -> list[Tensor]:
        """Write the gains and shifts of `factors` into `slot`. Returns the sources, as `write`."""
        sources = []
        for table, values in (
            (self.gains, [f.gains for f in factors]),
            (self.shifts, [f.shift for f in factors]),
        ):
            if table is None:
                continue
            row = torch.zeros(table.shape[1], dtype=torch.float32, device="cpu")
            for f, value in zip(factors, values, strict=True):
                if value is not None:
                    row[f.offset : f.offset + f.B.shape[-1]] = value
            sources.append(_copy_to(table[slot], row))
        return sources

    @torch.no_grad()
    def write_rows(self, slot: int, weight: OwnWeight | None, place: int = 0) -> list[Tensor]:
        """Write `weight` into `place` of the replaced rows, as those of `slot`. Returns the
        sources, as `write`."""
        if self.own is None:
            return []
        assert self.own_at is not None
        assert self.own_table is not None
        self.own_table[slot].fill_(-1)
        if weight is None:
            return []
        count, on_cuda = len(weight.rows), self.own.is_cuda
        if weight.structure is not None:
            self.own[place].view(-1)[:count].copy_(weight.rows, non_blocking=on_cuda)
            entry = torch.tensor([place, *weight.structure], dtype=torch.int32)
            return [_copy_to(self.own_table[slot], entry)]
        rows = torch.arange(count, dtype=torch.int32, device=self.own_at.device)
        indices = weight.indices
        indices = rows if indices is None else indices.to(rows.device, non_blocking=on_cuda)
        self.own[place, :count].copy_(weight.rows, non_blocking=True)
        if self.own_bias is not None:
            own_bias = self.own_bias[place, :count]
            if weight.bias is None:
                own_bias.zero_()
            else:
                own_bias.copy_(weight.bias, non_blocking=on_cuda)
        if self.kind == "embedding":
            self.own_at[place].fill_(-1)
            self.own_at[place, indices.long()] = rows
        else:
            self.own_at[place, :count] = indices
        entry = torch.tensor([place, ROWS, count, 0], dtype=torch.int32)
        return [_copy_to(self.own_table[slot], entry)]

    def _sibling_a(self, slots: slice, sibling: int, rank: int) -> Tensor:
        if self.kind == "embedding":
            return self.A[slots, :, :rank]
        features = self.A.shape[2] // self.ranks.shape[1]
        return self.A[slots, :rank, sibling * features : (sibling + 1) * features]


def _room_for_rows(
    kind: str,
    slots: int,
    shape: tuple[int, int, int],
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
) -> OwnRows:
    """Room for replaced rows of this `shape` (adapters, rows, features); none for zero rows."""
    adapters, rows, _ = shape
    if not rows:
        return OwnRows()
    embedding = kind == "embedding"
    places = adapters, vocabulary if embedding else rows
    return OwnRows(
        torch.zeros(shape, dtype=dtype, device=device),
        torch.full(places, -1, dtype=torch.int32, device=device),
        torch.full((slots, 4), -1, dtype=torch.int32, device=device),
        None if embedding else torch.zeros((adapters, rows), dtype=dtype, device=device),
    )


def _copy_to(target: Tensor, source: Tensor) -> Tensor:
    """Copy `source` into `target`. Returns what is copied: `source`, page-locked if `target` is on
    CUDA, since the host would wait for other memory."""
    source = source.pin_memory() if target.is_cuda else source
    target.copy_(source, non_blocking=target.is_cuda)
    return source


def _first_equal(factors: Sequence[Factors], ranks: Tensor, scales: Tensor) -> Tensor:
    """For each expert and sibling, the first sibling with the same A, rank and scale (`alike`)."""
    first_equal = torch.arange(ranks.shape[1], dtype=torch.int32).repeat(ranks.shape[0], 1)
    ordered = sorted(factors, key=lambda f: f.sibling)
    for n, f in enumerate(ordered):
        first = next((g for g in ordered[:n] if g.A is f.A), None)
        if first is not None:
            i, j = first.sibling, f.sibling
            same = (ranks[:, i] == ranks[:, j]) & (scales[:, i] == scales[:, j])
            first_equal[:, j] = torch.where(same, i, j)
    return first_equal
