"""Follows the owners of rows through operators that run in Python.

A dispatch mode sees each operator of an eager forward, or between the graphs of one. An operator
that uses a site's weight without calling its module is refused, since the delta would be lost.

What the results of an operator belong to follows from the labels, sizes and constants of its
operands, so it is found once, by the rules of graphs (`lorafx.ownership.real`), and remembered
(`lorafx.eager.known_labels`). Operators that read the values of indices are never remembered, and
views are not looked at: a label belongs to a storage, and a view's follows from strides when it is
used.

One file: what enters the mode and leaves it, at the end, reads and restores its private state.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress, repeat, takewhile
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lorafx.eager.known_labels import NOBODYS, UNKNOWN, WEIGHTS, KnownLabels
from lorafx.eager.undo import Undo
from lorafx.eager.weight_uses import WeightUses
from lorafx.errors import MatchError, ProvenanceError
from lorafx.kernels.ops.paged_attention import overwritten
from lorafx.model.marks import SiteMark
from lorafx.model.sites import Site
from lorafx.ownership.effects import (
    PARTS,
    SUMS,
    Effect,
    arguments_by_name,
    effect_of,
    tensors_in,
    written,
)
from lorafx.ownership.memory import Block, Memory, geometry_of
from lorafx.ownership.real import alone, labels_by_signature, labels_by_values
from lorafx.ownership.real_labels import Listed, Patchy, RealLabel, Shared, settled
from lorafx.placements import is_placed_class
from lorafx.program.argument_roles import tensor_leaves
from lorafx.program.derived import is_numbers, is_varied
from lorafx.torch_internals.dynamo import never_traced
from lorafx.torch_internals.graph_parts import (
    HigherOrderOperator,
    OpOverload,
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
    tree_map_only,
)
from lorafx.torch_internals.transforms import (
    in_backward,
    in_forward_mode,
    makes_graphs,
    transformed,
    wrapped_by_transform,
)

T = TypeVar("T")


class NeedsGraph(Exception):
    """Eager mode cannot prove that it would serve a call correctly; a graph may."""


class Following(TorchDispatchMode):
    """Notes the owners of operators' results in `memory`, and checks their operands with `uses`.

    `run` puts it on torch's stack, never a `with`: an interrupt between the steps of a context
    manager would leave it there. If two interrupts leave it there all the same, it follows nothing
    any more, and the next call of `run` removes it: the guard of inference mode would restore a
    stack that still has a mode, and then every operator without a tensor argument would fail.

    Args:
        memory: the labels of storages; without it only uses of weights are looked at.
        uses: checks uses of weights.
        remembered: what is known of operators from earlier calls.
        undo: records what is written that the call has not made.
        watched: code that is not known may write into memory unseen, so that a label holds only as
            long as `memory` finds its storage unchanged.
    """

    supports_higher_order_operators = True
    #: What is raised where the call is not served.
    error: Callable[[str], Exception] = MatchError
    #: Whether weights are looked for, too, where Python takes numbers out of tensors.
    sees_readers = False

    def __init__(
        self,
        memory: Memory | None = None,
        uses: WeightUses | None = None,
        *,
        remembered: KnownLabels | None = None,
        undo: Undo | None = None,
        watched: bool = True,
    ) -> None:
        super().__init__()
        self.memory, self._watched = memory, watched
        self.over = False
        self._undo, self._remembered = undo, KnownLabels() if remembered is None else remembered
        #: (tensor, its storage's labels and their epoch, its version, code) by identity.
        self._known: dict[int, tuple[weakref.ref[Tensor], Block, int, int, int]] = {}
        self._uses = uses
        #: Operands of the running operator that hold weights of touched sites, and these.
        self._weights: dict[Tensor, list[Site]] = {}
        #: How often torch counts a write, after the mode.
        self._counts = 1
        #: Whether the next operator is the one on DTensors that runs already.
        self._enters = False
        #: Why this forward is not served, which the model's code may have caught.
        self.refusal: str | None = None

    def refuse(self, why: str) -> NoReturn:
        """Raise `error`."""
        self.refusal = why
        raise self.error(why)

    def _refuse_transform(self) -> NoReturn:
        self.refusal = (
            "Python runs a transform of torch.func or make_fx in this forward, where the rows of "
            "tensors are not known; let Dynamo trace all of it, without a graph break"
        )
        raise ProvenanceError(self.refusal)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch wraps this mode in a function of Dynamo's

    def run(self, action: Callable[[], T]) -> T:
        """Return the result of `action`, with its operators followed."""
        _pop_ended()
        try:
            return self._pushed(action)
        finally:
            self.over = True

    def _pushed(self, action: Callable[[], T]) -> T:
        above = _popping(_len_torch_dispatch_stack())
        try:
            _push_on_torch_dispatch_stack(self)
            return action()
        finally:
            # One call of C: Python handles signals only where a Python function begins or returns.
            _exhaust(above, 0)

    def in_graph(self, action: Callable[[], T]) -> T:
        """Run `action`, a graph's operators, whose uses of weights `match` knows."""
        uses = self._uses
        try:
            self._uses = None
            return self._pushed(action)
        finally:
            self._uses = uses

    def check(self, results: object) -> None:
        """Raise `error` for what the model's code may have caught, and for `results` of the call
        that were not followed."""
        self._weights = {}
        for tensor in tensor_leaves(results):
            self.code(tensor)
        refusal = self.refusal
        if refusal is None and self._uses is not None:
            refusal = self._uses.refusal or self._unmarked()
        if refusal is not None:
            self.refuse(refusal)

    def _unmarked(self) -> str | None:
        """Why the results lack deltas; None if they do not."""
        assert self._uses is not None
        return self._uses.replaced_between_graphs

    def outside(self, action: Callable[[], T]) -> T:
        """Return the result of `action`, whose operators are not followed."""
        _pop_torch_dispatch_stack(None)
        try:
            return action()
        finally:
            _push_on_torch_dispatch_stack(self)

    def of_library(self, action: Callable[[], T]) -> T:
        """As `outside`, where functions of torch are what a library's tensor makes of them."""
        return Following.outside(self, action)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if types and any(map(is_placed_class, types)):
            return self._on_this_rank(func, args, kwargs or {})
        effect, named = effect_of(func), kwargs or {}
        if effect is Effect.VIEW or effect is None or self.over:
            if isinstance(func, HigherOrderOperator):
                self._look_at_bodies(func)
            return func(*args, **named)
        operands: list[tuple[Tensor, int]] = []
        signature: list[Any] = [func]
        self._weights = {}
        self._sign(args, signature, operands)
        if named:
            signature.extend(named)
            self._sign(tuple(named.values()), signature, operands)
        targets: Sequence[Tensor] = ()
        if effect is Effect.WRITE or effect is Effect.TURN:
            targets = written(func, args, named)
            if self._undo is not None:
                self._undo.note(target for target in targets if not self._is_born(target))
        elif effect is Effect.PAGES and self._undo is not None:
            self._undo.note_rows(overwritten(**arguments_by_name(func, args, named)))
        results = func(*args, **named)
        if func.overloadpacket in PARTS:
            results = [part.clone() for part in results]
        used = self._weights
        if effect is Effect.LIFT and not self.sees_readers:
            self._refuse_numbers(results)
        if self.memory is None:
            if used and self._uses is not None:
                self._uses.look(func, args, named, used, results, owned=True)
            return results
        if in_forward_mode():
            self._refuse_transform()
        if effect is Effect.LIFT:
            # A number is as good as Python's; several are of an origin that is not known.
            several = results.numel() > 1
            if used or (several and self._uses is None):
                return results  # it is looked at where it is used
            codes: Sequence[int] = (
                self._remembered.code(self.memory.look(results)) if several else NOBODYS,
            )
        elif effect is Effect.EMPTY:
            codes = (UNKNOWN,)
        elif effect is Effect.TURN:
            codes = (self._remembered.code(self.memory.look(results)),)
        elif func.overloadpacket in SUMS:
            results[-1].wait()
            codes = [code for _, code in operands]
        else:
            key = tuple(signature)
            known = self._remembered.results.get(key)
            codes = self._found(key, args, named, results, operands) if known is None else known
        made = used and all(isinstance(self._remembered.labels[code], Shared) for code in codes)
        if used and self._uses is not None:
            self._uses.look(func, args, named, used, results, owned=not made)
        if targets:
            uncounted = self._counts if func._schema.returns else 0  # torch counts no _foreach_add_
            self._note_written(targets, results, codes, operands, uncounted)
        elif isinstance(results, Tensor):
            self.note(results, codes[0])
        else:
            for output, code in zip(tensors_in(results), codes, strict=True):
                self.note(output, code)
        for output in tensors_in(results) if made else ():  # it is looked at where it is used
            self._known.pop(id(output), None)
        if not operands:
            self._note_made_of_nothing(func, results)
        return results

    def _refuse_numbers(self, tensor: Tensor) -> None:
        """Refuse a tensor of many of Python's numbers, such as a weight's `tolist()`. One of
        numpy's memory is known by that."""
        if self._uses is None or not is_numbers(tensor) or not is_varied(tensor):
            return
        if tensor.untyped_storage().resizable():
            self.refuse(self._uses.of_unknown_origin(tensor))

    def _note_made_of_nothing(self, func: OpOverload, results: object) -> None: ...

    def _look_at_bodies(self, func: HigherOrderOperator) -> None:
        """Refuse an operator such as cond, whose bodies would run without being followed."""
        followed = self.memory is not None and self._uses is not None and not self.over
        if followed and not makes_graphs():
            self.refuse(f"no rule for {func.name()}, whose bodies are not followed")

    def _on_this_rank(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run an operator on DTensors. What it makes of this rank's tensors is followed; there
        torch does not count writes."""
        if self._enters:
            self._enters = False
            return NotImplemented  # DTensor takes over, with this mode on the stack
        counts = self._counts
        try:
            self._counts, self._enters = 0, True
            return self._pushed(partial(func, *args, **named))
        finally:
            self._counts, self._enters = counts, False

    def _sign(
        self, values: Sequence[Any], signature: list[Any], operands: list[tuple[Tensor, int]]
    ) -> None:
        """Add arguments to an operator's signature, and their tensors to its operands."""
        for value in values:
            if isinstance(value, Tensor):
                code = self.code(value)
                operands.append((value, code))
                signature += (code, value.shape, value.dtype)
            elif isinstance(value, (list, tuple)):
                signature.append(len(value))
                self._sign(value, signature, operands)
            else:
                signature.append(value)

    def code(self, tensor: Tensor) -> int:
        """The code of a tensor's label."""
        key = id(tensor)
        known = self._known.get(key)
        if (
            known is not None
            and known[0]() is tensor
            and known[1].epoch == known[2]
            and known[3] == tensor._version
        ):
            storage = tensor.untyped_storage()
            if (
                storage._cdata == known[1].ref.cdata
                and storage.resizable() is not known[1].exported
            ):
                return known[4]
        parameter = self._remembered.parameters.get(key)
        if parameter is not None and parameter() is tensor:
            return NOBODYS
        return self._looked_up(tensor)

    def _looked_up(self, tensor: Tensor) -> int:
        if wrapped_by_transform(tensor) or makes_graphs():
            self._refuse_transform()
        uses, block = self._uses, None if self.memory is None else self.memory.block(tensor)
        touched = self._sites_in(tensor, block)
        if touched is not None:
            if touched:
                self._weights[tensor] = touched
            return WEIGHTS
        if self.memory is None:
            return UNKNOWN
        code, remembered = None, self._remembered
        if block is not None and self.memory.unwritten(block, tensor):
            geometry, label = next(iter(block.views.items()))
            key = remembered.code(label), geometry, geometry_of(tensor)
            code = remembered.views.get(key)
            if code is None:
                found = self.memory.look(tensor)
                code = remembered.code(found)
                if not isinstance(label, Patchy) and not isinstance(found, Patchy):
                    remembered.views[key] = code
        else:
            code = remembered.code(self.memory.look(tensor))
            if code == UNKNOWN and uses is not None and self._is_foreign(tensor, block):
                self.refuse(uses.of_unknown_origin(tensor))
        if block is not None and not self._watched:
            self._known[id(tensor)] = weakref.ref(tensor), block, block.epoch, tensor._version, code
        elif block is None and code == NOBODYS and isinstance(tensor, nn.Parameter):
            remembered.parameters[id(tensor)] = weakref.ref(tensor)
        return code

    def state(self, tensor: Tensor) -> object | None:
        """An object that is another one once the tensor, whose code was looked up, is written; None
        if not all writes are seen."""
        known = self._known.get(id(tensor))
        seen = known is not None and known[0]() is tensor and not known[1].exported
        return known if seen else None

    def settled(self, code: int) -> int:
        """The code of rows with deltas: one of nobody that had a request's is the request's."""
        label = self._remembered.labels[code]
        return self._remembered.code(settled(label)) if isinstance(label, Listed) else code

    def label(self, tensor: Tensor) -> RealLabel | None:
        """The owners of a tensor's elements; None if they are unknown."""
        return self._remembered.labels[self.code(tensor)]

    def note(self, tensor: Tensor, code: int) -> None:
        """Label a new tensor; nothing happens for a view."""
        assert self.memory is not None
        block = self.memory.born(tensor, self._remembered.labels[code])
        if block is not None and not self._watched:
            self._known[id(tensor)] = weakref.ref(tensor), block, block.epoch, tensor._version, code

    def _found(
        self,
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        named: Mapping[str, Any],
        results: Any,
        operands: Sequence[tuple[Tensor, int]],
    ) -> Sequence[int]:
        """The codes of results, by the rules."""
        func, remembered = key[0], self._remembered
        labels = {id(item): remembered.labels[code] for item, code in operands}
        try:
            by_values = key in remembered.by_values
            found = None if by_values else labels_by_signature(func, args, named, results, labels)
            if found is None:
                by_values = True
                found = labels_by_values(func, args, named, results, labels)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return [UNKNOWN] * len(list(tensors_in(results)))  # no rule knows their owners
        codes = [remembered.code(label) for label in found]
        # Cells belong to this call.
        if any(isinstance(label, Patchy) for label in labels.values()):
            return codes
        if by_values:
            remembered.by_values.add(key)
        elif not any(isinstance(label, Patchy) for label in found):
            remembered.results[key] = codes
        return codes

    def _note_written(
        self,
        targets: Sequence[Tensor],
        results: Any,
        codes: Sequence[int],
        operands: Sequence[tuple[Tensor, int]],
        uncounted: int,
    ) -> None:
        assert self.memory is not None
        labels = self._remembered.labels
        found = [labels[code] for code in codes]
        if len(targets) != len(list(tensors_in(results))):
            found = [alone([labels[code] for _, code in operands])] * len(targets)
        for target, label in zip(targets, found, strict=True):
            if self.memory.block(target) is None:  # it was the model's
                self._known.clear()
                self._remembered.parameters.clear()
            self.memory.write(target, label, uncounted=uncounted)

    def _sites_in(self, tensor: Tensor, block: Block | None) -> list[Site] | None:
        """The touched sites whose weights the tensor, of this memory, holds; None if it holds no
        site's."""
        uses = self._uses
        if uses is None or (block is not None and block.born and not uses.makes_weights):
            return None
        sites = uses.near(tensor)
        if sites is None and self.memory is not None and block is None:
            sites = uses.copied(tensor)  # neither made by this call nor an argument
        return sites

    def _is_foreign(self, tensor: Tensor, block: Block | None) -> bool:
        """Whether code that is not followed has made a tensor with this block, or written it."""
        if tensor.numel() <= 1 or tensor.is_inference() or self.memory is None:
            return False
        if block is not None:
            return block.rewritten and not block.views
        # What a derivative reads may be a delta's factors, which were made unseen.
        return not in_backward() and not self.memory.shares(tensor)

    def _is_born(self, tensor: Tensor) -> bool:
        """Whether this call has allocated the tensor."""
        block = None if self.memory is None else self.memory.block(tensor)
        return block is not None and block.born

    def read_outside(self, reader: str, tensor: Tensor) -> None:
        """`reader` hands the memory of this tensor to code outside of torch. Raises MatchError for
        a touched site's weight, past its module's call."""
        block = None if self.memory is None else self.memory.block(tensor)
        if self._uses is not None and (sites := self._sites_in(tensor, block)):
            self._uses.read(reader, sites)

    def note_data(self, tensor: Tensor) -> None:
        """The tensor is about to get other memory, past torch's operators."""
        if self._undo is not None:
            self._undo.to_restore(setattr, tensor, "data", tensor.data)

    @property
    def on_top(self) -> bool:
        """Whether the operators that run now are followed by this mode, and no transform runs."""
        return _get_current_dispatch_mode() is self and not self.over and not transformed()

    def marked_alone(self, mark: SiteMark) -> bool:
        """As `marked`, of deltas that were added with their products. Returns whether there were
        products without, or numbers read of the weight."""
        uses = self._uses
        return uses is not None and (bool(uses.marked_alone(mark)) or mark.path in uses.numbers)

    def is_own(self, tensor: Tensor, mark: SiteMark) -> bool:
        """Whether the tensor is of the site's weight, as the model had it when the call began."""
        return self._uses is None or self._uses.is_own(tensor, mark.path)

    def note_weight(self, tensor: Tensor, mark: SiteMark | None) -> None:
        """The tensor is what computes a weight, that of the site of `mark` if there is one."""
        self.note(tensor, NOBODYS)
        if self._uses is not None and mark is not None:
            self._uses.note_made(tensor, mark.path)

    def marked(self, mark: SiteMark, x: Tensor, y: Tensor) -> None:
        """The mark adds the delta of x to y. Refuses the call where y is not the site's product."""
        why = None if self._uses is None else self._uses.marked(mark, x, y)
        if why is not None:
            self.refuse(f"{mark.path}: {why}")


never_traced(Following.__torch_dispatch__.__code__)
never_traced(Following.outside.__code__)


def running() -> Following | None:
    """The mode on top of torch's stack; None if another mode is there."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Following) else None


def owners_are_noted() -> bool:
    """Whether some `Following` on torch's stack of modes notes owners."""
    stack = _get_current_dispatch_mode_stack()
    return any(
        isinstance(mode, Following) and not mode.over and mode.memory is not None for mode in stack
    )


def unfollowed(action: Callable[[Following | None], T]) -> T:
    """Run `action` without following, with the innermost mode, or None, as its argument."""
    removed: list[Following] = []
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


@contextmanager
def counted(values: T) -> Iterator[T]:
    """A block in which torch counts all writes, for `values` with copies of the tensors that were
    made in inference mode: the writes into such a one are not counted."""
    with torch.inference_mode(False), torch.no_grad():
        yield tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, values)


def inner_call(call: Callable[[], T]) -> T:
    """The result of `call`, one of a compiled model inside of a forward that is followed. It has
    requests of its own, so this forward does not know whose rows it returns."""

    def run(mode: Following | None) -> T:
        result = call()
        if mode is not None and mode.memory is not None:
            for tensor in tensor_leaves(result):
                mode.note(tensor, UNKNOWN)
        return result

    return unfollowed(run)


#: Exhausts an iterator, in C.
_exhaust: Callable[[Iterator[Any], int], object] = deque


def _popping(depth: int) -> Iterator[object]:
    """An iterator that pops torch's modes down to `depth`, in C, so no interrupt comes between."""
    lengths = takewhile(depth.__lt__, iter(_len_torch_dispatch_stack, -1))
    return map(_pop_torch_dispatch_stack, compress(repeat(None), lengths))


def _pop_ended() -> None:
    while isinstance(mode := _get_current_dispatch_mode(), Following) and mode.over:
        _pop_torch_dispatch_stack(None)
