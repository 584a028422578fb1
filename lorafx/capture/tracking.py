"""Tracks Python's computations between the graphs of a call.

While a call with adapters runs, every operator outside of graphs is seen. An operator that uses a
site's weight without calling its module is refused. For rows of different adapters, owners of
results are kept in the call's memory. Results of graphs are known from proofs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import compress, repeat, takewhile
from typing import Any, TypeVar

from torch import Tensor

from lorafx.capture.traced import never_traced
from lorafx.capture.weights_in_python import WeightUses
from lorafx.ownership.memory import Memory, RealLabel, storage_of
from lorafx.ownership.real import alone, result_labels, tensors_in, written
from lorafx.torch_internals.fake_tensors import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
)
from lorafx.torch_internals.operators import OpOverload

T = TypeVar("T")


class Tracking(TorchDispatchMode):
    """Notes owners of operators' results and writes in `memory`, and checks operators with `uses`.

    It is put on torch's stack by `run` and never by `with`: an interrupt between the
    steps of a context manager would leave it there. What two interrupts leave all the same sees
    nothing, and the next one takes it off: inference mode's guard, entered meanwhile, would bring
    torch's dispatcher back to a stack that has a mode, and every operator without a tensor would
    fail.
    """

    supports_higher_order_operators = True

    def __init__(self, memory: Memory | None = None, uses: WeightUses | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.uses = uses
        self.over = False

    def run(self, action: Callable[[], T]) -> T:
        _forget_ended()
        above = _pops(_len_torch_dispatch_stack())
        try:
            _push_on_torch_dispatch_stack(self)
            return action()
        finally:
            # A single C call: Python handles signals at Python function entries and after returns.
            self.over = True
            _run(above, 0)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps it; Dynamo is handled below

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        memory = self.memory
        operands = [*tensors_in(args), *tensors_in(dict(named))]
        of_graph = memory is None and not operands
        if self.over or of_graph or not isinstance(func, OpOverload):
            return func(*args, **named)
        before = {} if memory is None else {id(item): memory.look(item) for item in operands}
        results = func(*args, **named)
        if self.uses is not None:
            self.uses.look(func, operands, list(tensors_in(results)))
        if memory is not None:
            self._note(memory, func, args, named, results, operands, before)
            if not operands:
                self._made(func, results)
        return results

    def in_graph(self, action: Callable[[], T]) -> T:
        """Run `action`, a graph's operators, whose uses of weights `match` knows."""
        above, uses = _pops(_len_torch_dispatch_stack()), self.uses
        try:
            self.uses = None
            _push_on_torch_dispatch_stack(self)
            return action()
        finally:
            self.uses = uses
            _run(above, 0)

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
        shown = {storage_of(operand) for operand in operands}
        if not changed and all(storage_of(output) in shown for output in outputs):
            return  # views
        try:
            helds = result_labels(func, args, named, results, before)
        except (RuntimeError, TypeError, ValueError, IndexError):
            helds = [None] * len(outputs)  # unknown without a rule
        if len(changed) != len(outputs):
            now: list[RealLabel | None] = [alone(list(before.values()))] * len(changed)
        else:
            now = helds
        for tensor, held in zip(changed, now, strict=True):
            memory.write(tensor, held, uncounted=1)  # versions are counted above this mode
        for output, held in zip(outputs, helds, strict=True):
            if storage_of(output) not in shown:
                memory.note(output, held)

    def _made(self, func: OpOverload, results: object) -> None: ...


never_traced(Tracking.__torch_dispatch__.__code__)


def running() -> Tracking | None:
    """The tracking at work, unless another mode precedes it."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Tracking) else None


def looks() -> bool:
    """Whether owners are noted, perhaps behind other modes."""
    stack = _get_current_dispatch_mode_stack()
    return any(
        isinstance(mode, Tracking) and not mode.over and mode.memory is not None for mode in stack
    )


def untracked(action: Callable[[Tracking | None], T]) -> T:
    """Run `action` without tracking; it receives the innermost tracking."""
    taken: list[Tracking] = []
    try:
        while (mode := running()) is not None:
            taken.append(mode)
            _pop_torch_dispatch_stack(None)
        looking = [mode for mode in taken if not mode.over]  # an interrupt in a generator is lost
        return action(looking[0] if looking else None)
    finally:
        for mode in reversed(taken):
            if not mode.over:
                _push_on_torch_dispatch_stack(mode)


#: Exhausts an iterator, in C.
_run: Callable[[Iterator[Any], int], object] = deque


def _pops(depth: int) -> Iterator[object]:
    """Pops torch's modes down to `depth`, in C, so that no interrupt comes between."""
    lengths = takewhile(depth.__lt__, iter(_len_torch_dispatch_stack, -1))
    return map(_pop_torch_dispatch_stack, compress(repeat(None), lengths))


def _forget_ended() -> None:
    while isinstance(left := _get_current_dispatch_mode(), Tracking) and left.over:
        _pop_torch_dispatch_stack(None)
