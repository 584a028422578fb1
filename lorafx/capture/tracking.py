"""What Python computes between the graphs of one call.

While a call with adapters runs, every operator outside of a graph is seen. One that uses the weight
of a site without calling its module is refused. Where the rows use different adapters, the owners
of its results are kept in the call's memory. What a graph returns is known from its proofs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress, repeat, takewhile
from typing import Any, TypeVar

from torch import Tensor

from lorafx.capture.traced import never_traced
from lorafx.capture.weights_in_python import WeightUses
from lorafx.ownership.held import Held
from lorafx.ownership.memory import Memory, storage_of
from lorafx.ownership.real import alone, held_results, tensors_in, written
from lorafx.torch_internals.dispatch_modes import (
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
    """Notes the owners of what operators return and write in `memory`, and has `uses` look at them,
    where these are given.

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
        """What `action` returns, whose operators are looked at."""
        _forget_ended()
        above = _pops(_len_torch_dispatch_stack())
        try:
            _push_on_torch_dispatch_stack(self)
            return action()
        finally:
            # One call, of C: Python looks for signals where a Python function begins and where a
            # call has returned.
            self.over = True
            _run(above, 0)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap what sees each operator; Dynamo is told below

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        memory = self.memory
        if memory is None and not (_takes_tensors(args) or _takes_tensors(named.values())):
            return func(*args, **named)  # of no weight
        if self.over or not isinstance(func, OpOverload):
            return func(*args, **named)
        operands = [*tensors_in(args), *tensors_in(dict(named))]
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
        """What `action` returns, which runs the operators of a graph: `match` knows their uses of
        weights."""
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
            memory.write(tensor, held, uncounted=1)  # versions are counted above this mode
        for output, held in zip(outputs, helds, strict=True):
            if storage_of(output) not in shown:
                memory.note(output, held)

    def _made(self, func: OpOverload, results: object) -> None:
        """Told of what an operator without tensors among its arguments returned."""


never_traced(Tracking.__torch_dispatch__.__code__)


def running() -> Tracking | None:
    """The tracking that looks at operators now, where no other mode stands before it."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Tracking) else None


def looks() -> bool:
    """Whether owners are noted now, behind other modes perhaps."""
    stack = _get_current_dispatch_mode_stack()
    return any(
        isinstance(mode, Tracking) and not mode.over and mode.memory is not None for mode in stack
    )


def untracked(action: Callable[[Tracking | None], T]) -> T:
    """What `action` returns, whose operators are not looked at: those of a graph, and of what looks
    after labels. It is given the innermost tracking that would have looked."""
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


def _takes_tensors(values: Iterable[object]) -> bool:
    for value in values:
        if isinstance(value, _MAY_HOLD) and (isinstance(value, Tensor) or _takes_tensors(value)):
            return True
    return False


#: Tensors, and what holds some.
_MAY_HOLD = (Tensor, list, tuple)


#: Runs an iterator to its end, in C.
_run: Callable[[Iterator[Any], int], object] = deque


def _pops(depth: int) -> Iterator[object]:
    """Takes a mode off torch's stack at each step, until `depth` are left; all in C, so that no
    interrupt comes between two steps."""
    lengths = takewhile(depth.__lt__, iter(_len_torch_dispatch_stack, -1))
    return map(_pop_torch_dispatch_stack, compress(repeat(None), lengths))


def _forget_ended() -> None:
    """Take off torch's stack what interrupts have left there."""
    while isinstance(left := _get_current_dispatch_mode(), Tracking) and left.over:
        _pop_torch_dispatch_stack(None)
