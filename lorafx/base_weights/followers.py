"""Tensors that hold numbers of weights a second time, and have to be updated with them.

    W_UK = W.view(H, n + v, L)[:, :n].contiguous()      of an absorbed kv_b_proj, kept by its module

Views of a weight see new numbers by themselves. Copies are found by their values
(lorafx.base_weights.copies):

    rows of a weight at regular distances          computed anew, into the same memory
    recognisable, but in no such form              by the holder's `process_weights_after_loading`,
                                                   into the same memory; without one a refusal
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafx.base_weights.changes import Copy, copied
from lorafx.base_weights.copies import Repeat, repeats
from lorafx.base_weights.deltas import write
from lorafx.errors import CheckpointError
from lorafx.layers.quantization import QuantizeMethodBase
from lorafx.loading.loader import DerivedWeights
from lorafx.loading.weight_places import Target
from lorafx.loading.writer import UndoLog

if TYPE_CHECKING:
    from lorafx.program.program import Program

_HOOK = "process_weights_after_loading"


class DerivedCopies(DerivedWeights):
    """The copies that a model holds, as they are before an update."""

    def __init__(self, program: Program) -> None:
        self._copies = repeats(program)

    def holds(self, target: Target) -> bool:
        return any(copy.tensor is target.tensor for copy in self._copies)

    def refusals(self, filled: Iterable[Target]) -> list[str]:
        return [
            (
                f"{', '.join(str(weight.holder) for weight in copy.weights)}: {copy.holder} "
                f"{_origin(copy)} and cannot be updated with it; give its module a method "
                f"{_HOOK}() that computes it"
            )
            for copy in self._of(filled)
            if copy.form is None and _hook(copy) is None
        ]

    def fallible(self, filled: Iterable[Target]) -> bool:
        """Whether what follows these weights is computed by code of the model's, which may
        raise."""
        filled = list(filled)
        return any(copy.form is None for copy in self._of(filled)) or any(
            type(method).process_weights_after_loading
            is not QuantizeMethodBase.process_weights_after_loading
            for _, method in _methods(filled)
        )

    def refresh(self, filled: Iterable[Target], undo_log: UndoLog | None) -> None:
        """Compute what follows weights that got new numbers, in the memory where it is."""
        filled = list(filled)
        copies = self._of(filled)
        hooks = {
            id(copy.holder.module): (copy.holder.module, _hook(copy))
            for copy in copies
            if copy.form is None
        }
        methods = _methods(filled)
        if undo_log is not None:
            for copy in copies:
                undo_log.save(copy.tensor)
            for module, _ in (*hooks.values(), *methods):
                undo_log.save_held(module)
        for module, method in methods:
            method.process_weights_after_loading(module)
        for _, hook in hooks.values():
            assert hook is not None
            hook()
        for copy in copies:
            if copy.form is None:
                _keep_in_place(copy)
        self.recompute(filled)

    def recompute(self, filled: Iterable[Target]) -> None:
        """Compute the copies that have a form from their weights as they are."""
        for copy in self._of(filled):
            if copy.form is not None:
                dense = copy.weights[0].dense()
                assert dense is not None
                write(copy.tensor, copied(dense, Copy(copy.holder, copy.tensor, copy.form)))

    def _of(self, filled: Iterable[Target]) -> list[Repeat]:
        """The copies of weights that are among `filled` and that got no numbers themselves."""
        modules, tensors = set(), set()
        for target in filled:
            modules.add(id(target.module))
            tensors.add(id(target.tensor))
        return [
            copy
            for copy in self._copies
            if any(id(weight.holder.module) in modules for weight in copy.weights)
            if id(copy.tensor) not in tensors
        ]


def _methods(filled: Iterable[Target]) -> list[tuple[nn.Module, QuantizeMethodBase]]:
    """The modules among those of `filled` that store their weights by a method, with it."""
    modules = {id(target.module): target.module for target in filled}.values()
    found = [(module, getattr(module, "quant_method", None)) for module in modules]
    return [(module, method) for module, method in found if isinstance(method, QuantizeMethodBase)]


def _origin(copy: Repeat) -> str:
    if copy.certain:
        return "was computed from it"
    return "may have been computed from it (its numbers do not tell)"


def _hook(copy: Repeat) -> Callable[[], Any] | None:
    """What the holder computes a copy with, None where it has nothing that can be called."""
    hook = getattr(copy.holder.module, _HOOK, None)
    if not callable(hook):
        return None
    required = [
        parameter
        for parameter in inspect.signature(hook).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not required:
        return hook
    takes_dtype = [parameter.name for parameter in required] == ["act_dtype"]
    return (lambda: hook(copy.tensor.dtype)) if takes_dtype else None


def _keep_in_place(copy: Repeat) -> None:
    """Move what a hook computed into the tensor that was there, so that graphs see it."""
    holder = copy.holder
    made = getattr(holder.module, holder.attribute, None)
    if made is copy.tensor:
        return
    if not isinstance(made, Tensor) or made.shape != copy.tensor.shape:
        raise CheckpointError(f"{holder}: {_HOOK} left a tensor of another form there")
    write(copy.tensor, made)
    places: tuple[Any, ...] = (
        holder.module._parameters,
        holder.module._buffers,
        vars(holder.module),
    )
    for place in places:
        if place.get(holder.attribute) is made:
            place[holder.attribute] = copy.tensor
