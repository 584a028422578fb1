"""Tracks Python's computations between the graphs of a call.

While a call with adapters runs, a dispatch mode sees every operator outside of graphs. An operator
that uses a site's weight without calling its module is refused, since the delta would be lost; uses
are found by the memory that an operator reads. In mixed batches the owners of its results are kept
in the call's memory. For the results of graphs they follow from the graphs' proofs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import compress, repeat, takewhile
from typing import Any, TypeVar

from torch import Tensor

from lorafx.capture.traced import never_traced
from lorafx.eager.weight_uses import WeightUses
from lorafx.ownership.memory import Memory, RealLabel, storage_of
from lorafx.ownership.real import (
    alone,
    labels_by_signature,
    labels_by_values,
    tensors_in,
    written,
)
from lorafx.torch_internals.graph_parts import (
    OpOverload,
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
)

T = TypeVar("T")


class Tracking(TorchDispatchMode):
    """Notes owners of operators' results and writes in `memory`, and checks operators with `uses`.

    `run` puts it on torch's stack, never a `with`: an interrupt between the steps of a context
    manager would leave it there. If two interrupts leave it there all the same, it tracks nothing
    any more, and the next call of `run` removes it: the guard of inference mode would restore a
    stack that still has a mode, and then every operator without a tensor argument would fail.
    """

    supports_higher_order_operators = True

    def __init__(self, memory: Memory | None = None, uses: WeightUses | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.uses = uses
        self.over = False

    def run(self, action: Callable[[], T]) -> T:
        _pop_ended()
        above = _popping(_len_torch_dispatch_stack())
        try:
            _push_on_torch_dispatch_stack(self)
            return action()
        finally:
            # One call of C: Python handles signals only where a Python function begins or returns.
            self.over = True
            _exhaust(above, 0)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch wraps this mode; `never_traced` keeps Dynamo away

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        memory = self.memory
        operands = [*tensors_in(args), *tensors_in(dict(named))]
        irrelevant = memory is None and not operands
        if self.over or irrelevant or not isinstance(func, OpOverload):
            return func(*args, **named)
        before = {} if memory is None else {id(item): memory.look(item) for item in operands}
        results = func(*args, **named)
        if self.uses is not None:
            self.uses.look(func, operands, list(tensors_in(results)))
        if memory is not None:
            self._note(memory, func, args, named, results, operands, before)
            if not operands:
                self._note_new(func, results)
        return results

    def in_graph(self, action: Callable[[], T]) -> T:
        """Run `action`, a graph's operators, whose uses of weights `match` knows."""
        above, uses = _popping(_len_torch_dispatch_stack()), self.uses
        try:
            self.uses = None
            _push_on_torch_dispatch_stack(self)
            return action()
        finally:
            self.uses = uses
            _exhaust(above, 0)

    def _note(
        self,
        memory: Memory,
        func: OpOverload,
        args: tuple[Any, ...],
        named: Mapping[str, Any],
        results: object,
        operands: list[Tensor],
        before: Mapping[int, RealLabel | None],
    ) -> None:
        outputs, changed = list(tensors_in(results)), written(func, args, named)
        operand_memory = {storage_of(operand) for operand in operands}
        if not changed and all(storage_of(output) in operand_memory for output in outputs):
            return  # views
        try:
            labels = labels_by_signature(func, args, named, results, before)
            if labels is None:
                labels = labels_by_values(func, args, named, results, before)
        except (RuntimeError, TypeError, ValueError, IndexError):
            labels = [None] * len(outputs)  # no rule knows their owners
        if len(changed) != len(outputs):
            written_labels: list[RealLabel | None] = [alone(list(before.values()))] * len(changed)
        else:
            written_labels = labels
        for tensor, label in zip(changed, written_labels, strict=True):
            memory.write(tensor, label, uncounted=1)  # torch counts this version after the mode
        for output, label in zip(outputs, labels, strict=True):
            if storage_of(output) not in operand_memory:
                memory.note(output, label)

    def _note_new(self, func: OpOverload, results: object) -> None: ...


never_traced(Tracking.__torch_dispatch__.__code__)


def running() -> Tracking | None:
    """The tracking on top of torch's stack of modes; None if another mode is there."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Tracking) else None


def owners_are_noted() -> bool:
    """Whether some tracking on torch's stack of modes notes owners."""
    stack = _get_current_dispatch_mode_stack()
    return any(
        isinstance(mode, Tracking) and not mode.over and mode.memory is not None for mode in stack
    )


def untracked(action: Callable[[Tracking | None], T]) -> T:
    """Run `action` without tracking, with the innermost tracking, or None, as its argument."""
    removed: list[Tracking] = []
    try:
        while (mode := running()) is not None:
            removed.append(mode)
            _pop_torch_dispatch_stack(None)
        # A list: an interrupt inside of a generator would be lost.
        active = [mode for mode in removed if not mode.over]
        return action(active[0] if active else None)
    finally:
        for mode in reversed(removed):
            if not mode.over:
                _push_on_torch_dispatch_stack(mode)


#: Exhausts an iterator, in C.
_exhaust: Callable[[Iterator[Any], int], object] = deque


def _popping(depth: int) -> Iterator[object]:
    """An iterator that pops torch's modes down to `depth`, in C, so no interrupt comes between."""
    lengths = takewhile(depth.__lt__, iter(_len_torch_dispatch_stack, -1))
    return map(_pop_torch_dispatch_stack, compress(repeat(None), lengths))


def _pop_ended() -> None:
    while isinstance(mode := _get_current_dispatch_mode(), Tracking) and mode.over:
        _pop_torch_dispatch_stack(None)
