"""Tensors that hold numbers of weights a second time, and have to follow them.

    W_UK = W.view(H, n + v, L)[:, :n].contiguous()      of an absorbed kv_b_proj, kept by its module

Views of a weight see new numbers by themselves. Copies are found by their values, which are rows of
a weight beside or below the module that holds them (lorafx.graph.weight_forms):

    rows at regular distances                      computed anew, into the same memory
    recognisable, but in no such form              by the holder's `process_weights_after_loading`,
                                                   into the same memory; without one a refusal
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafx.base_weights.changes import Copy, copied
from lorafx.base_weights.merge import write
from lorafx.base_weights.places import Target
from lorafx.errors import CheckpointError, ConfigError
from lorafx.graph.derived import Holder, is_near, is_numbers, is_varied
from lorafx.graph.weight_forms import Form, in_runs, rows_alike, rows_form
from lorafx.layers.quantization import QuantizeMethodBase
from lorafx.model.experts import expert_weights
from lorafx.model.module_graph import storage_key
from lorafx.model.quantized import dequantize
from lorafx.registry import lookup

_HOOK = "process_weights_after_loading"


@dataclass(frozen=True)
class _Copy:
    """A tensor that repeats numbers of a weight: who holds it, of which, and where they are in it
    (None where that has no form)."""

    holder: Holder
    tensor: Tensor
    weight: Holder
    form: Form | None

    @property
    def hook(self) -> Any:
        """What the holder computes it with, None where it has nothing that can be called."""
        hook = getattr(self.holder.module, _HOOK, None)
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
        return (lambda: hook(self.tensor.dtype)) if takes_dtype else None


class DerivedCopies:
    """The copies that a model holds, as they are before an update."""

    def __init__(self, model: nn.Module) -> None:
        self._copies: list[_Copy] = []
        candidates = list(_candidates(model))
        if not candidates:
            return
        weights = [
            Holder(path, module, entry.weight)
            for path, module in model.named_modules()
            if (entry := lookup(module)) is not None and entry.kind == "linear"
        ]
        for holder, tensor in candidates:
            copy = _copy_of(holder, tensor, weights)
            if copy is not None:
                self._copies.append(copy)

    def holds(self, target: Target) -> bool:
        """Whether a target is computed from another."""
        return any(copy.tensor is target.tensor for copy in self._copies)

    def refusals(self, filled: Iterable[Target]) -> list[str]:
        """What cannot follow the weights that get new numbers."""
        return [
            f"{copy.weight}: {copy.holder} was computed from it and cannot follow; give its module "
            f"a method {_HOOK}() that computes it"
            for copy in self._of(filled)
            if copy.form is None and copy.hook is None
        ]

    def refresh(self, filled: Iterable[Target]) -> None:
        """Compute what follows weights that got new numbers, in the memory where it is."""
        filled = list(filled)
        for module in {id(target.module): target.module for target in filled}.values():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading(module)
        copies = self._of(filled)
        hooked = [copy for copy in copies if copy.form is None]
        for hook in {id(copy.holder.module): copy.hook for copy in hooked}.values():
            hook()
        for copy in copies:
            if copy.form is None:
                _keep_in_place(copy)
            else:
                weight = _dense(copy.weight)
                assert weight is not None
                held = Copy(copy.holder, copy.tensor, copy.form)
                write(copy.tensor, copied(weight, held))

    def _of(self, filled: Iterable[Target]) -> list[_Copy]:
        """The copies of weights that are among `filled` and that got no numbers themselves."""
        modules, tensors = set(), set()
        for target in filled:
            modules.add(id(target.module))
            tensors.add(id(target.tensor))
        return [
            copy
            for copy in self._copies
            if id(copy.weight.module) in modules and id(copy.tensor) not in tensors
        ]


def _candidates(model: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    """Matrices and more that modules hold and that are not their own weights."""
    own = {storage_key(parameter) for parameter in model.parameters()}
    for path, module in model.named_modules():
        entry = lookup(module)
        if entry is not None or expert_weights(module) is not None:
            continue
        for place in (module._parameters, module._buffers, vars(module)):
            for name, value in place.items():
                if not isinstance(value, Tensor) or value.dim() < 2 or not is_numbers(value):
                    continue
                viewed = not isinstance(value, nn.Parameter) and storage_key(value) in own
                if not viewed and is_varied(value):
                    yield Holder(path, module, name), value


def _copy_of(holder: Holder, tensor: Tensor, weights: Iterable[Holder]) -> _Copy | None:
    parent = holder.path.rpartition(".")[0]
    for weight in weights:
        if not is_near(weight.path, parent):
            continue
        dense = _dense(weight)
        if dense is None or dense.device != tensor.device:
            continue
        rounded = dense.to(tensor.dtype)
        form = rows_form(tensor, rounded) if tensor.numel() <= dense.numel() else None
        if form is not None:
            return _Copy(holder, tensor, weight, form)
        if isinstance(tensor, nn.Parameter):
            continue  # a weight of its own: where a checkpoint lacks it, it is missing
        inside = tensor.numel() <= dense.numel()
        if (inside and in_runs(tensor, rounded)) or rows_alike(tensor, dense):
            return _Copy(holder, tensor, weight, None)
    return None


def _dense(weight: Holder) -> Tensor | None:
    """W (N, K) as numbers, dequantised where it is quantised; None where it cannot be had."""
    try:
        dense = dequantize(weight.module)
    except ConfigError:
        return None
    return dense if dense.dim() == 2 and is_numbers(dense) else None


def _keep_in_place(copy: _Copy) -> None:
    """Move what a hook computed into the tensor that was there, so that graphs see it."""
    holder = copy.holder
    made = getattr(holder.module, holder.attribute, None)
    if made is copy.tensor:
        return
    if not isinstance(made, Tensor) or made.shape != copy.tensor.shape:
        raise CheckpointError(f"{holder}: {_HOOK} left something of another form there")
    write(copy.tensor, made)
    places: tuple[Any, ...] = (
        holder.module._parameters,
        holder.module._buffers,
        vars(holder.module),
    )
    for place in places:
        if place.get(holder.attribute) is made:
            place[holder.attribute] = copy.tensor
