"""Tracks Python's computations between the graphs of a call.

While a call with adapters runs, every operator outside of graphs is seen. An operator that uses a
site's weight without calling its module is refused, since the delta would be lost; uses are found
by the memory that it reads. For rows of different adapters, owners of results are kept in the
call's memory. Results of graphs are known from proofs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress, repeat, takewhile
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorafx.capture.traced import never_traced
from lorafx.errors import MatchError
from lorafx.model.sites import Site
from lorafx.ownership.memory import Memory, RealLabel, storage_of
from lorafx.ownership.pointwise import READS_NO_VALUES
from lorafx.ownership.real import alone, result_labels, tensors_in, written
from lorafx.program.program import Program
from lorafx.program.stack import python_line, running_modules
from lorafx.torch_internals.graph_parts import (
    OpOverload,
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
    is_traceable_wrapper_subclass,
)

T = TypeVar("T")


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
