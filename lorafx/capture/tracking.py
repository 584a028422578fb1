"""Owners of what Python computes between the graphs of one call.

While a call runs whose rows use different adapters, every operator that runs outside of a graph is
seen, and what its results hold is noted in the call's memory. Graphs are not looked into: their
own proofs say what they return.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _pop_mode_temporarily,
)

from lorafx.ownership.held import Held
from lorafx.ownership.memory import Memory, storage_of
from lorafx.ownership.real import alone, held_results, tensors_in, written


class Tracking(TorchDispatchMode):
    """Notes the owners of what operators return and write, in `memory`."""

    supports_higher_order_operators = True

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **named)
        operands = [*tensors_in(args), *tensors_in(dict(named))]
        before = {id(operand): self.memory.look(operand) for operand in operands}
        results = func(*args, **named)
        self._note(func, args, named, results, operands, before)
        return results

    def _note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        named: Mapping[str, Any],
        results: object,
        operands: list[Tensor],
        before: Mapping[int, Held | None],
    ) -> None:
        outputs, changed = list(tensors_in(results)), written(func, args, named)
        shown = {storage_of(operand) for operand in operands}
        if not changed and all(storage_of(output) in shown for output in outputs):
            return  # views
        try:
            helds = held_results(func, args, named, results, before)
        except (RuntimeError, TypeError, ValueError, IndexError):
            helds = [None] * len(outputs)  # what no rule can follow is unknown
        if len(changed) != len(outputs):
            now: list[Held | None] = [alone(list(before.values()))] * len(changed)
        else:
            now = helds
        for tensor, held in zip(changed, now, strict=True):
            self.memory.write(tensor, held, uncounted=1)  # versions are counted above this mode
        for output, held in zip(outputs, helds, strict=True):
            if storage_of(output) not in shown:
                self.memory.note(output, held)


def running() -> Tracking | None:
    """The tracking that looks at operators now, where no other mode stands before it."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Tracking) else None


def looks() -> bool:
    """Whether operators are looked at now, behind other modes perhaps."""
    return any(isinstance(mode, Tracking) for mode in _get_current_dispatch_mode_stack())


def untracked(tracking: Tracking | None) -> AbstractContextManager[object]:
    """Inside, operators are not looked at: those of a graph, and of what looks after labels."""
    return nullcontext() if tracking is None else _pop_mode_temporarily()
