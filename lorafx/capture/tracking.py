"""Tracks Python's computations between the graphs of a call.

While a call with adapters runs, a dispatch mode sees every operator outside of graphs. An operator
that uses a site's weight without calling its module is refused, since the delta would be lost; uses
are found by the memory that an operator reads. In mixed batches the owners of its results are kept
in the call's memory. For the results of graphs they follow from the graphs' proofs.
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
    """Bytes `first` to `last` (exclusive) of a storage, which hold the weight of `site`."""

    first: int
    last: int
    site: Site


class WeightUses:
    """The checks of the operators that a call runs in Python, for uses of sites' weights."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._ranges: dict[int, list[_Range]] | None = None
        self._error: MatchError | None = None

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
        if self._ranges is None:
            self._ranges = self._touched_ranges()
        for plain in _plain_tensors(tensor):
            for known in self._ranges.get(storage_of(plain) or 0, ()):
                first, last = _byte_range(plain)
                if first < known.last and known.first < last:
                    yield known.site

    def _touched_ranges(self) -> dict[int, list[_Range]]:
        ranges: dict[int, list[_Range]] = {}
        for site in self._program.sites:
            weight = self._program.weight_of(site)
            if weight is None or not self._program.is_touched(site):
                continue
            for part in _plain_tensors(weight):
                if (key := storage_of(part)) is not None:
                    ranges.setdefault(key, []).append(_Range(*_byte_range(part), site))
        return ranges

    def _is_called(self, site: Site, running: Sequence[nn.Module]) -> bool:
        """Whether the site's module, whose mark adds the delta, or another with its weight runs."""
        weight = self._program.weight_of(site)
        return any(
            module is site.module
            or module is site.marked
            or any(parameter is weight for parameter in module._parameters.values())
            for module in running
        )


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name)
        if isinstance(inner, Tensor):
            yield from _plain_tensors(inner)


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel() or tensor.layout is not torch.strided:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (first + int(last) + 1) * size


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
            labels = result_labels(func, args, named, results, before)
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
