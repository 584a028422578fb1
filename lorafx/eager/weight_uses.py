"""Uses of a site's weight outside of its module's call, where nothing would add the delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lorafx.errors import MatchError
from lorafx.model.made_weights import maker_of, raw_tensors
from lorafx.model.sites import Site
from lorafx.model.weight_formats import plain_tensors
from lorafx.ownership.memory import storage_of
from lorafx.ownership.pointwise import READS_NO_VALUES
from lorafx.program.derived import overlap
from lorafx.program.program import Program
from lorafx.program.stack import python_line, running_modules


class WeightUses:
    """The checks of the operators that a call runs in Python, for uses of sites' weights."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._error: MatchError | None = None
        #: Sites whose weight a hook makes before each call.
        self._made: list[Site] = []

    @cached_property
    def _sites(self) -> dict[int, list[tuple[Site, Tensor]]]:
        """The touched sites, with the plain tensors that hold their weights, by storage; none for
        untouched ones."""
        sites: dict[int, list[tuple[Site, Tensor]]] = {}
        for site in self._program.sites:
            weight, name = self._program.weight_of(site), site.eligible.weight
            parts = [] if weight is None else list(plain_tensors(weight))
            if maker_of(site.module, name):
                parts += raw_tensors(site.module, name)
                self._made += [site] if weight is not None else []
            for part in parts:
                touched = sites.setdefault(storage_of(part) or 0, [])
                touched += [(site, part)] if self._program.is_touched(site) else []
        return sites

    def near(self, tensor: Tensor) -> list[tuple[Site, Tensor]] | None:
        """The touched sites with weights in the tensor's memory, and these; None if it holds no
        site's weight."""
        storage = storage_of(tensor)
        if storage is not None:
            found = self._sites.get(storage)
            return self._made_near(storage) if found is None and self._made else found
        parts = [self._sites.get(storage_of(part) or 0) for part in plain_tensors(tensor)]
        known = [sites for sites in parts if sites is not None]
        return [item for sites in known for item in sites] if known else None

    def _made_near(self, storage: int) -> list[tuple[Site, Tensor]] | None:
        """As `near`, for weights that hooks have made in this call."""
        made = [(site, self._program.weight_of(site)) for site in self._made]
        known = [(site, w) for site, w in made if w is not None and storage_of(w) == storage]
        return [item for item in known if self._program.is_touched(item[0])] if known else None

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
        for plain in plain_tensors(tensor):
            for site, part in self.near(plain) or ():
                if plain.numel() and part.numel() and overlap(plain, part):
                    yield site

    def _is_called(self, site: Site, running: Sequence[nn.Module]) -> bool:
        """Whether the site's module, whose mark adds the delta, or another with its weight runs."""
        weight = self._program.weight_of(site)
        return any(
            module is site.module
            or module is site.marked
            or any(parameter is weight for parameter in module._parameters.values())
            for module in running
        )
