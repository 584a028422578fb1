"""Uses of a site's weight outside of its module's call, where nothing would add the delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafx.errors import MatchError
from lorafx.model.sites import Site
from lorafx.ownership.memory import storage_of
from lorafx.ownership.pointwise import READS_NO_VALUES
from lorafx.program.program import Program
from lorafx.program.stack import python_line, running_modules
from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass


class _Range(NamedTuple):
    """Bytes `first` to `last` (exclusive) of a storage, which hold the weight of `site`."""

    first: int
    last: int
    site: Site


class WeightUses:
    """The checks of the operators that a call runs in Python, for uses of sites' weights."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._ranges: dict[int, list[_Range]] | None = None
        self._error: MatchError | None = None

    @cached_property
    def sites(self) -> dict[int, list[tuple[Site, Tensor]]]:
        """The touched sites, with their weights, by `place_of` those; none for untouched ones."""
        sites: dict[int, list[tuple[Site, Tensor]]] = {}
        for site in self._program.sites:
            weight = self._program.weight_of(site)
            if weight is not None:
                touched = sites.setdefault(place_of(weight), [])
                touched += [(site, weight)] if self._program.is_touched(site) else []
        return sites

    def look(self, func: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Raise MatchError for a touched site's weight read outside of its modules' calls."""
        if func.namespace == "lorafx" or func.overloadpacket in READS_NO_VALUES:
            return
        sites = list(dict.fromkeys(site for item in operands for site in self._sites_read(item)))
        if not sites:
            return
        memory = {storage_of(item) for item in operands}
        if results and all(storage_of(item) in memory for item in results):
            return  # the results are views
        running = list(running_modules())
        line = python_line()
        if line is None:  # inside another compiler's graph
            return
        bypassed = [site.path for site in sites if not self._is_called(site, running)]
        if bypassed:
            self._error = MatchError(
                f"LoRA cannot be applied at {', '.join(bypassed)}: {func.overloadpacket} at "
                f"{line} uses the weight without calling its module, in a function that "
                "Dynamo does not trace, so the delta would be lost. Call the module there, "
                "let Dynamo trace the function, or leave the module out by exclude_modules"
            )
            raise self._error

    def refuse(self) -> None:
        """Raise the error of `look` again, which the model's code may have caught."""
        if self._error is not None:
            raise self._error

    def _sites_read(self, tensor: Tensor) -> Iterator[Site]:
        if self._ranges is None:
            self._ranges = self._touched_ranges()
        for plain in _plain_tensors(tensor):
            for known in self._ranges.get(storage_of(plain) or 0, ()):
                first, last = _byte_range(plain)
                if first < known.last and known.first < last:
                    yield known.site

    def _touched_ranges(self) -> dict[int, list[_Range]]:
        ranges: dict[int, list[_Range]] = {}
        for site in self._program.sites:
            weight = self._program.weight_of(site)
            if weight is None or not self._program.is_touched(site):
                continue
            for part in _plain_tensors(weight):
                if (key := storage_of(part)) is not None:
                    ranges.setdefault(key, []).append(_Range(*_byte_range(part), site))
        return ranges

    def _is_called(self, site: Site, running: Sequence[nn.Module]) -> bool:
        """Whether the site's module, whose mark adds the delta, or another with its weight runs."""
        weight = self._program.weight_of(site)
        return any(
            module is site.module
            or module is site.marked
            or any(parameter is weight for parameter in module._parameters.values())
            for module in running
        )


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name)
        if isinstance(inner, Tensor):
            yield from _plain_tensors(inner)


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel() or tensor.layout is not torch.strided:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (first + int(last) + 1) * size


def place_of(tensor: Tensor) -> int:
    """The storage of a tensor, or the tensor itself where it is composite."""
    return storage_of(tensor) or id(tensor)
