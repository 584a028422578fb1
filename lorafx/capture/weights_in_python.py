"""Refuses uses of sites' weights by Python between graphs without calling their modules, which
would lose the delta. Uses are found by the memory that operators read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafx.errors import MatchError
from lorafx.model.sites import Site
from lorafx.ownership.memory import storage_of
from lorafx.ownership.pointwise import READS_NO_VALUES
from lorafx.program.program import Program
from lorafx.program.stack import python_line, running_modules
from lorafx.torch_internals.subclasses import is_traceable_wrapper_subclass


class _Range(NamedTuple):
    first: int
    last: int
    site: Site


class WeightUses:
    """What looks at the operators of one call that run in Python."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._ranges: dict[int, list[_Range]] | None = None
        self._found: MatchError | None = None

    def look(self, func: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Raise MatchError for a touched site's weight read outside of its modules' calls."""
        if func.namespace == "lorafx" or func.overloadpacket in READS_NO_VALUES:
            return
        sites = list(dict.fromkeys(site for item in operands for site in self._shown(item)))
        if not sites:
            return
        memory = {storage_of(item) for item in operands}
        if results and all(storage_of(item) in memory for item in results):
            return  # one more view
        running = list(running_modules())
        line = python_line()
        if line is None:  # inside another compiler's graph
            return
        past = [site.path for site in sites if not self._held(site, running)]
        if past:
            self._found = MatchError(
                f"LoRA cannot be applied at {', '.join(past)}: {func.overloadpacket} at "
                f"{line} uses the weight without calling its module, in a function that "
                "Dynamo does not trace, so the delta would be lost. Call the module there, "
                "let Dynamo trace the function, or leave the module out by exclude_modules"
            )
            raise self._found

    def refuse(self) -> None:
        """Raise an error again that the model's code has caught."""
        if self._found is not None:
            raise self._found

    def _shown(self, tensor: Tensor) -> Iterator[Site]:
        if self._ranges is None:
            self._ranges = self._touched()
        for part in _parts(tensor):
            for found in self._ranges.get(storage_of(part) or 0, ()):
                first, last = _extent(part)
                if first < found.last and found.first < last:
                    yield found.site

    def _touched(self) -> dict[int, list[_Range]]:
        ranges: dict[int, list[_Range]] = {}
        for site in self._program.sites:
            weight = self._program.weight_of(site)
            if weight is None or not self._program.is_touched(site):
                continue
            for part in _parts(weight):
                if (key := storage_of(part)) is not None:
                    ranges.setdefault(key, []).append(_Range(*_extent(part), site))
        return ranges

    def _held(self, site: Site, running: Sequence[nn.Module]) -> bool:
        """Whether the site, whose mark comes later, or another holder of the weight is running."""
        weight = self._program.weight_of(site)
        return any(
            module is site.module
            or module is site.marked
            or any(parameter is weight for parameter in module._parameters.values())
            for module in running
        )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name)
        if isinstance(inner, Tensor):
            yield from _parts(inner)


def _extent(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel() or tensor.layout is not torch.strided:
        return 0, 0
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (first + int(reach) + 1) * size
