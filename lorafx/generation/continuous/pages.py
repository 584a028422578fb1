"""The pages of keys and values that attention reads and writes while an engine runs a model.

A compiled forward takes the tensor of all pages, which attention passes to the operator
`lorafx::paged_cache`; transformers' own `update` would write into views of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)

from lorafx.errors import ConfigError
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE, PagedStep, Pages
from lorafx.kernels.triton.attention import has_kernels

#: The dtypes for which `lorafx::paged_attention`, with its sums in float32, is exact enough.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayerPlace(NamedTuple):
    """Where a layer's keys and values are, for lorafx.kernels.ops.paged_attention."""

    group: int
    first_key: int
    first_value: int
    sentinel: int
    ring: bool
    row: tuple[int, int, torch.dtype]  # heads, size of a head


class WindowLayers(NamedTuple):
    """The layers of one group that keep a window. `table` (rows, size of a row) are the pages in
    rows of their size; `firsts` (2 · layers,) int64 has the first rows of their keys and values."""

    group: int
    sentinel: int
    table: Tensor
    firsts: Tensor


class StepCache(Pages, PagedAttentionCache):
    """The pages of `cache`, and the rows that one step reads and writes.

    Attributes:
        pages: (bytes,) uint8, the whole cache.
        places: layer index -> the position of its keys and values.
        kinds: the kinds of attention, by transformers' names.
        read: for each kind, the rows to read, (N,) int64.
        write: for each kind, the rows to write, (T,) int64.
        seen: for each kind, the range of each token's request in `read`, (T, 2) int64; None on
            devices without attention by requests.
        masks: for each kind, the mask that the model is given, (1, 1, T, N); None like `seen`.
    """

    read: Sequence[Tensor] = ()
    write: Sequence[Tensor] = ()
    seen: Sequence[Tensor | None] = ()
    masks: Sequence[Tensor | None] = ()

    def __init__(self, cache: PagedAttentionCache) -> None:
        # The constructor of the base class would allocate another cache.
        self.pages: Tensor = cache.cache_tensor
        self.places = {
            layer: _place(allocator, layer) for layer, allocator in cache.layer_to_allocator.items()
        }
        self.kinds = tuple(cache.cache_allocators)
        self._windows = _windows(self.places.values(), self.pages)
        self._sentinels = {window.group: window.sentinel for window in self._windows}
        self._trash = [
            (allocator.read_trash_index, allocator.write_trash_index)
            for allocator in cache.cache_allocators.values()
        ]

    def step(
        self,
        read: Sequence[Tensor],
        write: Sequence[Tensor],
        seen: Sequence[Tensor | None] | None = None,
        masks: Sequence[Tensor | None] | None = None,
    ) -> StepCache:
        """This cache for a step that reads and writes these rows. transformers passes no rows to
        read if only the new tokens are seen; here these are read, so that one graph serves both."""
        step = copy.copy(self)
        step.read = [
            rows.clone() if rows.numel() else self._rows_of_new(group, new)
            for group, (rows, new) in enumerate(zip(read, write, strict=True))
        ]
        step.write = [rows.clone() for rows in write]
        step.seen = [None] * len(write) if seen is None else [*seen]
        step.masks = [None] * len(write) if masks is None else [*masks]
        return step

    def _rows_of_new(self, group: int, new: Tensor) -> Tensor:
        """The rows to read in order to see the new tokens only, which are written to `new`."""
        sentinel = self._sentinels.get(group)
        return new.clone() if sentinel is None else torch.full_like(new, sentinel)

    def without(self, absent: Tensor, absent_keys: Sequence[Tensor]) -> StepCache:
        """This cache for the same step without the tokens `absent`, (T,) bool, for which nothing is
        written, and with zeros for the keys `absent_keys`, (N,) bool for each kind, which only they
        see."""
        read, write = [], []
        for group, (rows, new) in enumerate(zip(self.read, self.write, strict=True)):
            trash_read, trash_write = self._trash[group]
            hidden = absent_keys[group]
            if group in self._sentinels:  # a sentinel stands for a token of this step
                hidden = hidden & (rows != self._sentinels[group])
            read.append(rows.masked_fill(hidden, trash_read))
            write.append(new.masked_fill(absent, trash_write))
        return self.step(read, write, self.seen, self.masks)

    def snapshot(self) -> Callable[[Tensor | None], None]:
        """Save the rows that this step overwrites in layers with a window; elsewhere it writes rows
        that are unused. The result restores them for all tokens (None), or some, (T,) bool."""
        saved = []
        for window in self._windows:
            rows = window.firsts[:, None] + self.write[window.group]
            saved.append((window.table, rows, window.table.index_select(0, rows.flatten())))

        def restore(tokens: Tensor | None) -> None:
            for table, rows, values in saved:
                restored = torch.ones_like(rows, dtype=torch.bool)
                if tokens is not None:
                    restored &= tokens
                table.index_copy_(0, rows[restored], values[restored.flatten()])

        return restore

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values (1, H, T, D) of a layer's new tokens. Returns those that its
        queries see, (1, H, N, D)."""
        place = self._checked(layer_idx, key_states, value_states)
        return PAGED_CACHE(
            key_states,
            value_states,
            self.pages,
            self.read[place.group],
            self.write[place.group],
            place.first_key,
            place.first_value,
            place.sentinel,
            place.ring,
            self.seen[place.group],
            self.masks[place.group],
        )

    def attend(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        mask: Tensor | None,
        scale: float,
        cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor | None:
        """Write the keys and values, and return the attention of the new tokens, (1, H, T, D). If
        the mask is not the step's, or there is no kernel, return None and write nothing."""
        place = self._checked(layer_idx, key_states, value_states)
        seen = self.seen[place.group]
        if seen is None or mask is None or mask is not self.masks[place.group]:
            return None
        step = PagedStep(
            query,
            key_states,
            value_states,
            self.pages,
            self.read[place.group],
            self.write[place.group],
            seen,
            mask,
            place.first_key,
            place.first_value,
            place.sentinel,
            place.ring,
            scale,
            0.0 if cap is None else cap,
            sinks,
        )
        if query.device.type == "cpu":
            has_kernel = query.dtype in _DTYPES and query.dtype == key_states.dtype
        else:
            has_kernel = has_kernels(step)
        return PAGED_ATTENTION(*step) if has_kernel else None

    def _checked(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> LayerPlace:
        place = self.places[layer_idx]
        for states in (key_states, value_states):
            if (states.shape[1], states.shape[3], states.dtype) != place.row:
                raise ConfigError(
                    f"layer {layer_idx} has keys or values of {states.shape[1]} heads, "
                    f"{states.shape[3]} numbers each, {states.dtype}, and its cache is for "
                    f"{place.row}, by the model's configuration; call generate() for this model"
                )
        return place


def _windows(places: Iterable[LayerPlace], pages: Tensor) -> tuple[WindowLayers, ...]:
    rings = [place for place in places if place.ring]
    groups = []
    for group, sentinel, row in dict.fromkeys((p.group, p.sentinel, p.row) for p in rings):
        firsts = [
            first
            for place in rings
            if (place.group, place.row) == (group, row)
            for first in (place.first_key, place.first_value)
        ]
        heads, numbers, dtype = row
        flat, width = pages.view(dtype), heads * numbers
        table = flat[: flat.numel() // width * width].view(-1, width)
        rows = torch.tensor(firsts, device=pages.device)
        groups.append(WindowLayers(group, sentinel, table, rows))
    return tuple(groups)


def _place(allocator: CacheAllocator, layer: int) -> LayerPlace:
    """The position of a layer's keys and values. Raises ConfigError if the allocator is of neither
    class that is known here."""
    cls = type(allocator)
    ring = isinstance(allocator, SlidingAttentionCacheAllocator)
    known = SlidingAttentionCacheAllocator if ring else FullAttentionCacheAllocator
    if not isinstance(allocator, known) or cls.update is not known.update:
        raise ConfigError(
            f"layer {layer} keeps its cache by a {cls.__module__}.{cls.__qualname__}, and lorafx "
            "only knows how FullAttentionCacheAllocator and SlidingAttentionCacheAllocator write "
            "and read theirs; call generate() for this model"
        )
    keys, values = allocator._kv_token_views[layer]
    width = keys.shape[1] * keys.shape[2]
    return LayerPlace(
        allocator.index,
        int(keys.storage_offset() // width),
        int(values.storage_offset() // width),
        allocator.sentinel_index,
        ring,
        (keys.shape[1], keys.shape[2], keys.dtype),
    )
