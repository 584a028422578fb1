"""Linears of an eager forward whose product and delta are one step.

What torch's own `nn.Linear` computes is known, and so is that row m of its result belongs to the
request of row m of its input. While a forward runs, `LinearCall` is the forward of such a site: it
runs the product and the delta without having each operator followed, which takes as long as they
do. A linear of another class, with other hooks than its mark, or whose input has owners that do not
lead, runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

from torch import Tensor, nn

from lorafx.model.marks import SiteMark
from lorafx.model.replaced_methods import ReplacedMethod, Replacement
from lorafx.model.sites import Site


class LinearCall(ReplacedMethod):
    """The forward of one site while an eager forward runs, which `RowDeltas.linear` computes."""

    def __init__(self, module: nn.Linear, mark: SiteMark) -> None:
        super().__init__(module, "forward")
        self.module, self.mark = module, mark
        self.weight = module.weight

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        deltas = self.mark.runtime.deltas
        if deltas is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            result = deltas.linear(self, args[0])
            if result is not None:
                return result
        return self.original(*args, **kwargs)


class LinearCalls:
    """The `LinearCall`s of a program's sites."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._modules = {s.path: s.module for s in sites if isinstance(s.module, nn.Linear)}
        self._calls: dict[str, LinearCall] = {}

    def of(self, touched: Set[str]) -> Iterator[Replacement]:
        """The forwards of those of these sites that adapters touch, and that are plain now."""
        for path, module in self._modules.items():
            if path in touched and (mark := _mark_alone(module)) is not None:
                call = self._calls.get(path)
                if call is None or call.mark is not mark or call.weight is not module.weight:
                    call = self._calls[path] = LinearCall(module, mark)
                yield module, "forward", call


def _mark_alone(module: nn.Linear) -> SiteMark | None:
    """The mark of a module that is called as torch's `nn.Linear`, with no other hook."""
    own = "forward" in vars(module) or type(module).forward is not nn.Linear.forward
    if own or len(module._forward_hooks) != 1 or module._forward_pre_hooks:
        return None
    mark: object = next(iter(module._forward_hooks.values()))
    if not isinstance(mark, SiteMark) or not mark.is_plain or mark.transposed:
        return None
    unlike = mark.derived or mark.stored or mark.made or mark.handler is not None
    return None if unlike else mark
