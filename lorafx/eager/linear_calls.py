"""Linears of an eager forward whose product and delta are one step.

What torch's own `nn.Linear` computes is known, and what registered modules do that keep their
weight in a format of a library; and so is that row m of the result belongs to the request of row m
of the input. While a forward runs, `LinearCall` is the forward of such a module: it runs the
product, and the delta of a site, without having each operator followed, which takes as long as they
do and needs a rule for each of a library's. A linear of another class, a plain one with other hooks
than its mark, or one whose input has owners that do not lead, runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from torch import Tensor, nn

from lorafx.model.marks import Runtime, SiteMark
from lorafx.model.replaced_methods import ReplacedMethod, Replacement
from lorafx.model.sites import has_own_forward
from lorafx.program.program import Program


class LinearCall(ReplacedMethod):
    """The forward of one module while an eager forward runs, which `RowDeltas.linear` computes.
    `mark`: that of a site whose delta is added to the product; None leaves it to the mark's call.
    """

    def __init__(self, module: nn.Module, mark: SiteMark | None, runtime: Runtime) -> None:
        super().__init__(module, "forward")
        self.module, self.mark, self._runtime = module, mark, runtime
        self.weight = module._parameters.get("weight")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        deltas = self._runtime.deltas
        if deltas is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            result = deltas.linear(self, args[0])
            if result is not None:
                return result
        return self.original(*args, **kwargs)


class LinearCalls:
    """The `LinearCall`s of a program's sites, and of all its modules with quantised weights."""

    def __init__(self, program: Program) -> None:
        self._runtime = program.runtime
        sites = [(s.module, s.path) for s in program.sites if isinstance(s.module, nn.Linear)]
        paths = {id(module): path for module, path in sites}
        #: Modules of quantised weights, whose registered forward is a product. One that looks for
        #: outliers in x rounds otherwise where x differs in its last bit, as a graph's may.
        self.quantised = {
            id(module): module
            for module, entry in program.quantised.entries
            if entry.is_linear and not has_own_forward(module, entry)
        }
        for module in program.quantised.sized_by_data:
            self.quantised.pop(id(module), None)
        modules = {id(module): module for module, _ in sites} | self.quantised
        self._modules = [(module, paths.get(key)) for key, module in modules.items()]
        self._calls: dict[int, LinearCall] = {}

    def of(self, touched: Set[str]) -> Iterator[Replacement]:
        """The forwards of the modules that are quantised, or that adapters touch and that are plain
        now."""
        for module, path in self._modules:
            mark = _mark_alone(module) if path in touched else None
            if "forward" in vars(module) or (mark is None and id(module) not in self.quantised):
                continue
            call, weight = self._calls.get(id(module)), module._parameters.get("weight")
            if call is None or call.mark is not mark or call.weight is not weight:
                call = self._calls[id(module)] = LinearCall(module, mark, self._runtime)
            yield module, "forward", call


def _mark_alone(module: nn.Module) -> SiteMark | None:
    """The mark of a site whose module is called with no other hook, and is known."""
    if len(module._forward_hooks) != 1 or module._forward_pre_hooks:
        return None
    mark: object = next(iter(module._forward_hooks.values()))
    if not isinstance(mark, SiteMark) or not mark.is_plain or mark.transposed:
        return None
    known = mark.stored or type(module).forward is nn.Linear.forward
    return mark if known and not (mark.derived or mark.made or mark.handler) else None
