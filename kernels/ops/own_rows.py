"""Weights of adapters' own in place of the base's, in plain aten.

    linear      y[m, n] ← x[m] · own[i, t] + own_bias[i, t]     n = own_at[i, t], t < count
    embedding   y[m]    ← own[i, t]                             t = own_at[i, id of m], t ≥ 0

with i, form, count, _ = own_table[s], s the slot of row m. A slot replaces all rows of the weight
(a module that was trained as a whole), some (tokens that were trained), or none, i = −1. Rows of
other slots and base rows keep y, bit for bit. The y of a linear has the slot's delta, and so have
the rows that replace its outputs; that of an embedding gets it later.

The weight of a linear may also be given by what it changes, a `Structure`:

    Kronecker       y ← y + vec(w₂ X w₁ᵀ)   W + w₁ ⊗ w₂, X (k₁, K / k₁) the entries of x
    turned input    y ← y + W (D x)         W (I + D), D block-diagonal
    turned output   y ← y + D y             (I + D) W, and the bias
    shifted output  y ← y + β               the bias + β
    scaled pair     y ← y + b ∘ B (d ∘ A x) W + diag(b) B diag(d) A, of an A and B for all slots

A linear visits the slots that are present, those of one structure together. The host waits for them
if slots are on an accelerator: a product with the weight of every slot would cost more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.ops.delta import groups, row_slots
from lorafx.kernels.ops.op_library import check_rows, define, require

#: The forms of an entry of `own`: rows, or the numbers of a structure.
ROWS, KRONECKER, TURNED_INPUT, TURNED_OUTPUT, SHIFTED_OUTPUT, SCALED_PAIR = range(6)
#: x Wᵀ of x (M, K) on a CPU, by the dtype of both, once code for it is generated and loaded
#: (lorafx.kernels.cpu.weight_mm). Until then aten computes it.
PRODUCTS: dict[torch.dtype, Callable[[Tensor, Tensor], Tensor]] = {}
_NOT_OF_INPUTS = frozenset({ROWS, KRONECKER, TURNED_OUTPUT, SHIFTED_OUTPUT, SCALED_PAIR})


class Structure(NamedTuple):
    """How a weight (N, K) is changed. Kronecker: w₁ (`first`, `second`) before w₂ (N / first, K /
    second). Turned: the blocks of D, (K or N / first, first, first). Shifted: β (N,). Scaled: d
    (first,) before b (N,). What a form does not have is 1 or 0."""

    form: int
    first: int
    second: int = 0

    def numbers(self, rows: int, columns: int) -> int:
        """How many numbers the change of a weight (`rows`, `columns`) has. Raises ValueError if it
        is for none of this size."""
        if self.form == KRONECKER:
            if rows % self.first or columns % self.second:
                raise ValueError(f"which w1 ({self.first}, {self.second}) does not divide")
            return self.first * self.second + (rows // self.first) * (columns // self.second)
        if self.form == SCALED_PAIR:
            return self.first + rows
        turned, what = (columns, "inputs") if self.form == TURNED_INPUT else (rows, "outputs")
        if turned % self.first:
            raise ValueError(f"and blocks of {self.first} do not divide its {what}")
        return turned * self.first

    def of_weight(self, numbers: Tensor, weight: Tensor) -> Tensor:
        """The changed weight (N, K), but of a pair; or the bias (N,), which those of outputs alone
        change."""
        if self.form == SHIFTED_OUTPUT:
            return weight + numbers if weight.dim() == 1 else weight
        if weight.dim() == 1:
            return weight + _turned(weight[None, None], numbers[None], self.first)[0, 0]
        if self.form == KRONECKER:
            (first,), (second,) = self._factors(numbers[None], weight.shape[1])
            return weight + torch.kron(first, second)
        if self.form == TURNED_OUTPUT:
            return weight + _turned(weight.mT[None], numbers[None], self.first)[0].mT
        across = numbers.view(1, -1, self.first, self.first).mT.flatten(1)
        return weight + _turned(weight[None], across, self.first)[0]

    def _factors(self, numbers: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """w₁ and w₂ of each slot."""
        cut = self.first * self.second
        return (
            numbers[:, :cut].unflatten(1, (self.first, self.second)),
            numbers[:, cut:].unflatten(1, (-1, columns // self.second)),
        )

    def added(
        self,
        numbers: Tensor,
        x: Tensor,
        columns: int,
        weight: Tensor | None,
        pair: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """What is added to y (S, M, N), M rows of each of S slots, `columns` N, of their numbers
        (S, …), x (S, M, K), the base's weight (N, K), which only a turned input needs, and the A
        and B of a `pair`, in its own dtype. Outputs are turned by `_turn`."""
        if self.form == SCALED_PAIR:
            a, b = pair
            require("own_linear", a is not None and b is not None, "there is no pair to scale")
            d, outputs = numbers.unsqueeze(1).split_with_sizes((self.first, columns), -1)
            return _linear(_linear(x, a) * d, b) * outputs  # type: ignore[arg-type]
        if self.form == KRONECKER:
            first, second = self._factors(numbers, x.shape[-1])
            product = x.reshape(len(x), -1, second.shape[2]) @ second.mT  # (S, M · k₁, N / n₁)
            across = product.view(*x.shape[:2], self.second, -1).transpose(1, 2).flatten(2)
            return (first @ across).unflatten(2, (x.shape[1], -1)).transpose(1, 2).flatten(2)
        if self.form == SHIFTED_OUTPUT:
            return numbers.unsqueeze(1)
        turned = _turned(x, numbers, self.first)
        require("own_linear", weight is not None, "inputs are turned, so it needs the weight")
        return _linear(turned, weight.to(turned.dtype))  # type: ignore[union-attr]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of x (S, M, K), in the dtype of the weight."""
    x, product = x.to(weight.dtype), PRODUCTS.get(weight.dtype)
    if product is None or x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight)
    return product(x.flatten(0, 1), weight).unflatten(0, x.shape[:2])


def _turned(x: Tensor, numbers: Tensor, block: int) -> Tensor:
    """D x of x (S, M, K), the D of each slot of blocks (K / block, block, block), or of one block
    for all."""
    if block == 1:
        return x * numbers.unsqueeze(1)
    pieces = x.unflatten(2, (-1, block)).transpose(1, 2)
    across = numbers.unflatten(1, (-1, block, block)).mT
    return (pieces @ across).transpose(1, 2).flatten(2)


def _turn(x: Tensor, numbers: Tensor, block: int, out: Tensor | None = None) -> Tensor:
    """x + D x, written into `out` if it is given."""
    if block == 1:
        return torch.addcmul(x, x, numbers.unsqueeze(1), out=out)
    return torch.add(x, _turned(x, numbers, block), out=out)


class OwnRows(NamedTuple):
    """The weights that M of the adapters in S slots have in place of the base's.

    own (M, T, K), in the dtype of the weight: the rows, or from its beginning the numbers of a
    structure. own_at, int32: for a linear (M, T), the output that each row computes; for an
    embedding (M, V), the row of each id, −1 for the base's. own_table, int32 (S, 4): the index of
    a slot among the M, −1 for none, the form, and the number of rows or a structure's sizes.
    own_bias (M, T): the bias of a linear for each row. pair_a (R, K), pair_b (N, R): the pair that
    adapters scale, views of the model's one, if the bank was given one.
    """

    own: Tensor | None = None
    own_at: Tensor | None = None
    own_table: Tensor | None = None
    own_bias: Tensor | None = None
    pair_a: Tensor | None = None
    pair_b: Tensor | None = None


#: The schema of these arguments, which are absent if the bank has no room for such rows.
OWN_ROWS = ", ".join(f"Tensor? {name}=None" for name in OwnRows._fields)


def own_linear(
    x: Tensor,
    y: Tensor,
    own: Tensor,
    own_at: Tensor,
    own_table: Tensor,
    own_bias: Tensor,
    pair_a: Tensor | None,
    pair_b: Tensor | None,
    slots: Tensor,
    rows: int,
    weight: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """A contiguous copy of y (..., N) with the outputs of x (..., K) that adapters replace. Inputs
    are `turned` already, or the base's `weight` (N, K) is needed where they are to be."""
    own_linear_fake(x, y, own, own_at, own_table, own_bias, pair_a, pair_b, slots, rows)
    count, columns = x.shape[:-1].numel(), y.shape[-1]
    forms = _NOT_OF_INPUTS if turned else _NOT_OF_INPUTS | {TURNED_INPUT}
    found = _alike(own_table, slots, rows, count, forms)
    x, before, out = x.reshape(count, x.shape[-1]), y.reshape(count, columns), _copy(y, found)
    flat, dtype = out.view(count, columns), torch.promote_types(x.dtype, own.dtype)
    for alike in found:
        structure = alike.structure
        if structure.form == ROWS:
            for i, of_slot in zip(alike.entries, alike.places, strict=True):
                size = structure.first
                replaced, bias = own[i, :size].to(dtype), own_bias[i, :size].to(dtype)
                outputs = torch.nn.functional.linear(x[of_slot].to(dtype), replaced, bias)
                outputs = outputs.to(y.dtype)
                if size == columns:
                    flat[of_slot] = outputs
                else:
                    flat[of_slot[:, None], own_at[i, :size].long()] = outputs
        else:
            numbers = alike.numbers(own, columns, dtype)
            y_rows, x_rows = alike.rows_of(before), alike.rows_of(x).to(dtype)
            change: Callable[..., Tensor]
            if structure.form == TURNED_OUTPUT:
                change = partial(_turn, y_rows.to(dtype), numbers, structure.first)
            else:
                added = structure.added(numbers, x_rows, columns, weight, (pair_a, pair_b))
                change = partial(torch.add, y_rows, added)
            alike.put(flat, dtype, change)
    return out


class _Alike(NamedTuple):
    """Slots with one structure and equally many rows: their `entries` of what adapters have of
    their own, `chosen` as an index, and their `places` (S, M) among the rows, of which they may
    have `every` one in order."""

    structure: Structure
    entries: tuple[int, ...]
    chosen: slice | Tensor
    places: Tensor
    every: bool

    def numbers(self, own: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Those of each slot (S, …), for a weight of so many rows."""
        return own.flatten(1)[self.chosen, : self.structure.numbers(rows, own.shape[2])].to(dtype)

    def rows_of(self, x: Tensor) -> Tensor:
        """These rows of x: (S, M, K)."""
        rows = x if self.every else x.index_select(0, self.places.flatten())
        return rows.view(*self.places.shape, -1)

    def put(self, out: Tensor, dtype: torch.dtype, change: Callable[..., Tensor]) -> None:
        """Write these rows of `out` as `change` computes them in `dtype`: at once (`out=`) where
        they fit in."""
        if self.every and torch.promote_types(dtype, out.dtype) == out.dtype:
            change(out=out.view(*self.places.shape, -1))
            return
        rows = change().flatten(0, 1).to(out.dtype)
        _ = out.copy_(rows) if self.every else out.index_copy_(0, self.places.flatten(), rows)


def _copy(x: Tensor, found: list[_Alike]) -> Tensor:
    """A contiguous copy of x, or room for one of which all rows will be written."""
    written = any(alike.every and alike.structure.form != ROWS for alike in found)
    like = torch.empty_like if written else torch.clone
    return like(x, memory_format=torch.contiguous_format)


def _alike(
    own_table: Tensor, slots: Tensor, rows: int, count: int, forms: frozenset[int]
) -> list[_Alike]:
    """What the slots of `count` rows have of these forms."""
    table = tuple(map(tuple, own_table.tolist()))
    return _found(table, tuple(slots.tolist()), rows, count, forms, slots.device)


@lru_cache(32)  # the same at many sites of a call
def _found(
    table: tuple[tuple[int, ...], ...],
    slots: tuple[int, ...],
    rows: int,
    count: int,
    forms: frozenset[int],
    device: torch.device,
) -> list[_Alike]:
    owner = row_slots(torch.tensor(slots, dtype=torch.int32, device=device), rows, count)
    by_structure: dict[tuple[Structure, int], list[tuple[int, int, Tensor]]] = {}
    for slot, index in groups(owner, len(table)):
        i, *sizes = table[slot]
        if i >= 0 and sizes[0] in forms:
            kind = Structure(*sizes), len(index)
            by_structure.setdefault(kind, []).append((int(index[0]), i, index))
    found = []
    for (structure, _), slots_alike in by_structure.items():
        _, entries, indices = zip(*sorted(slots_alike, key=itemgetter(0)), strict=True)
        places, behind = torch.stack(indices), entries[0] + len(entries)
        adjacent = entries == tuple(range(entries[0], behind))
        chosen = slice(entries[0], behind) if adjacent else torch.tensor(entries, device=device)
        every = torch.equal(places.flatten(), torch.arange(count, device=device))
        found.append(_Alike(structure, entries, chosen, places, every))
    return found


def own_linear_fake(
    x, y, own, own_at, own_table, own_bias, pair_a, pair_b, slots, rows, weight=None, turned=False
):
    op = "own_linear"
    require(op, own.dim() == 3 and own.shape[2] == x.shape[-1], "own is (adapters, rows, K)")
    require(op, own.shape[1] <= y.shape[-1], f"{own.shape[1]} rows for {y.shape[-1]} outputs")
    for name, tensor in (("own_at", own_at), ("own_bias", own_bias)):
        require(op, tensor.shape == own.shape[:2], f"{name} is (adapters, rows)")
    require(op, own_table.shape[1:] == (4,), "own_table is (slots, 4)")
    shape = (y.shape[-1], x.shape[-1])
    require(op, weight is None or weight.shape == shape, "weight is (N, K)")
    require(op, pair_a is None or pair_a.shape[1:] == shape[1:], "pair_a is (R, K)")
    require(op, pair_b is None or pair_b.shape[:1] == shape[:1], "pair_b is (N, R)")
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    return y.new_empty(y.shape)


def own_input(x: Tensor, own: Tensor, own_table: Tensor, slots: Tensor, rows: int) -> Tensor:
    """A contiguous copy of x (..., K) with the rows that adapters turn."""
    own_input_fake(x, own, own_table, slots, rows)
    columns, dtype = x.shape[-1], torch.promote_types(x.dtype, own.dtype)
    count = x.shape[:-1].numel()
    found = _alike(own_table, slots, rows, count, frozenset({TURNED_INPUT}))
    out, x = _copy(x, found), x.reshape(count, columns)
    for alike in found:
        before, numbers = alike.rows_of(x).to(dtype), alike.numbers(own, 0, dtype)
        change = partial(_turn, before, numbers, alike.structure.first)
        alike.put(out.view(count, columns), dtype, change)
    return out


def own_input_fake(x, own, own_table, slots, rows):
    op = "own_input"
    require(op, own.dim() == 3 and own.shape[2] == x.shape[-1], "own is (adapters, rows, K)")
    require(op, own_table.shape[1:] == (4,), "own_table is (slots, 4)")
    check_rows(op, x.shape[:-1], x.shape[:-1], rows)
    return x.new_empty(x.shape)


def own_product(
    x: Tensor,
    y: Tensor,
    replaced: OwnRows,
    slots: Tensor,
    rows: int,
    product: Callable[[Tensor], Any],
) -> Tensor:
    """`own_linear` of y = `product`(x), a call that can read other inputs than x."""
    turned = own_input(x, replaced.own, replaced.own_table, slots, rows)  # type: ignore[arg-type]
    changed = (turned != x).any(-1)
    if bool(changed.any()):
        result = product(turned[changed])
        result = result[0] if isinstance(result, tuple) else result
        y = y.index_put((changed,), result.to(y.dtype))
    return own_linear(x, y, *replaced, slots, rows, turned=True)  # type: ignore[arg-type]


def own_embedding(
    ids: Tensor, y: Tensor, own: Tensor, own_at: Tensor, own_table: Tensor, slots: Tensor, rows: int
) -> Tensor:
    """A contiguous copy of y (*ids.shape, N) with the rows that adapters replace."""
    own_embedding_fake(ids, y, own, own_at, own_table, slots, rows)
    owner = row_slots(slots, rows, ids.numel()).view(ids.shape).long()
    entry = torch.where(owner >= 0, own_table[owner.clamp(min=0), 0], -1).long()
    i = entry.clamp(min=0)
    at = torch.where(entry >= 0, own_at[i, ids], -1).long()
    replacements = own[i, at.clamp(min=0)].to(y.dtype)
    return torch.where((at >= 0).unsqueeze(-1), replacements, y).contiguous()


def own_embedding_fake(ids, y, own, own_at, own_table, slots, rows):
    op = "own_embedding"
    require(op, own.dim() == 3 and own.shape[2] == y.shape[-1], "own is (adapters, rows, N)")
    require(op, own_at.dim() == 2, "own_at is (adapters, vocabulary)")
    require(op, own_table.shape[1:] == (4,), "own_table is (slots, 4)")
    check_rows(op, ids.shape, y.shape[:-1], rows)
    return y.new_empty(y.shape)


_SCHEMA = "Tensor y, Tensor own, Tensor own_at, Tensor own_table"
define(
    f"own_linear(Tensor x, {_SCHEMA}, Tensor own_bias, Tensor? pair_a, Tensor? pair_b,"
    " Tensor slots, SymInt rows,"
    " Tensor? weight=None, bool turned=False) -> Tensor",
    own_linear,
    own_linear_fake,
)
define(
    "own_input(Tensor x, Tensor own, Tensor own_table, Tensor slots, SymInt rows) -> Tensor",
    own_input,
    own_input_fake,
)
define(
    f"own_embedding(Tensor ids, {_SCHEMA}, Tensor slots, SymInt rows) -> Tensor",
    own_embedding,
    own_embedding_fake,
)
