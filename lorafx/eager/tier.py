"""Runs a call in eager mode, for which no graph is ready.

The model's own forward runs with its marks. In a batch that mixes adapters the owners of rows are
followed through all operators (`lorafx.eager.following`), by the rules that prove a graph. What is
not proved is not guessed: everything that the call has changed is restored, and it needs a graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorafx.eager.deltas import GatheredFactors
from lorafx.eager.expert_loops import ExpertLoops, LoopDeltas
from lorafx.eager.following import Following, NeedsGraph
from lorafx.eager.in_python import InPython, WatchedInPython
from lorafx.eager.known_labels import KnownLabels
from lorafx.eager.linear_calls import LinearCalls
from lorafx.eager.undo import Undo
from lorafx.eager.weight_uses import WeightUses
from lorafx.errors import MatchError, OutOfRangeError, ProvenanceError
from lorafx.kernels.ops.paged_attention import Pages
from lorafx.model.module_graph import ModuleGraph
from lorafx.ownership.memory import Memory
from lorafx.ownership.real_labels import MOST_REQUESTS
from lorafx.program.program import Program
from lorafx.program.row_handoff import label_arguments
from lorafx.torch_internals.dynamo import raised_by_dynamo
from lorafx.torch_internals.transformers_parts import cell_of_forward

T = TypeVar("T")

#: The share of the model's bytes that gathered factors may take.
_SHARE = 4

#: Packages whose modules write into tensors by operators alone.
_SEEN = frozenset(("torch", "transformers", "diffusers", "lorafx"))


class EagerTier:
    """The eager forwards of a program. `replacing` is that of the session's `Replacements`."""

    def __init__(self, program: Program, replacing: Callable[..., Any]) -> None:
        self._program, self._replacing = program, replacing
        self._linears, self._loops = LinearCalls(program), ExpertLoops(program)
        self._remembered = KnownLabels()
        nbytes = sum(parameter.nbytes for parameter in program.model.parameters())
        self._looked_at: ModuleGraph | None = None
        self._unknown = True
        self._gathered = GatheredFactors(max(nbytes // _SHARE, 1 << 24))

    def run(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The result of `target`, the model's forward, for the batch that is set.

        Raises:
            NeedsGraph: eager mode cannot prove this batch; nothing has changed.
            OutOfRangeError: an index lies outside of its table.
        """
        program, runtime = self._program, self._program.runtime
        try:
            if not runtime.active:
                return target(*args, **kwargs)
            # The writes of inference tensors are not counted.
            inference = torch.is_inference_mode_enabled()
            with torch.inference_mode(False), torch.no_grad():
                return self._followed(target, args, kwargs, inference=inference)
        except IndexError as error:
            if isinstance(error, OutOfRangeError) or not _is_of_call(program, error):
                raise
            raise OutOfRangeError(_ranges_text(program, error)) from error

    def look(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        read: Callable[[Any], T],
        sites: list[tuple[str, Tensor]] | None = None,
    ) -> T:
        """What `read` takes from the result of `run`. Everything is then as before the call. The
        outputs of `sites` are noted, which are then computed by the sites' operators alone."""
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.no_grad():
            if self._program.runtime.active:
                return self._followed(target, args, kwargs, read, sites, inference=inference)
            holders = self._program.model, *args, *kwargs.values()
            undo = Undo(holders, self._program.runtime.device)
            try:
                following = Following(undo=undo)
                return read(following.run(partial(target, *args, **kwargs)))
            finally:
                undo.run()

    def _followed(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        read: Callable[[Any], Any] | None = None,
        sites: list[tuple[str, Tensor]] | None = None,
        *,
        inference: bool,
    ) -> Any:
        program, runtime = self._program, self._program.runtime
        counted: dict[int, Tensor] = {}
        args = tuple(_counted(value, counted) for value in args)
        kwargs = {name: _counted(value, counted) for name, value in kwargs.items()}
        watched = self._has_unknown_code()
        undo = Undo((*args, *kwargs.values()), runtime.device, trusted=not watched)
        if inference:
            undo.exchange(partial(_counted, counted=counted))  # such as those of static caches
        memory = self._labelled_arguments(counted, watched=watched)
        undo.record((program.model,))
        self._remembered.begin()
        uses = WeightUses(program)
        uses.near(runtime.slots)  # finds all, before the forward may replace parameters
        following = (WatchedInPython if watched else InPython)(
            memory, uses, remembered=self._remembered, undo=undo, watched=watched
        )
        runtime.deltas = LoopDeltas(program, following, self._gathered, sites)
        try:
            action = partial(target, *args, **kwargs)
            calls = [*self._loops.of_forwards()]
            if not watched and sites is None:
                calls += self._linears.of(program.batch.touched)
            action = partial(self._replacing, calls, action)
            result = following.run(action)
            following.check(result)
            program.keep_constants(memory)
            if read is not None:
                result = read(result)
                undo.run()
            return result
        except Exception as error:
            refusal = following.refusal or uses.refusal
            if refusal is None and isinstance(error, (NeedsGraph, ProvenanceError, MatchError)):
                refusal = str(error)
            if refusal is None and raised_by_dynamo(error):  # fullgraph=True, while_loop
                refusal = f"a function that is compiled by itself does not run without: {error}"
            if refusal is None and read is None:
                raise
            undo.run()
            if refusal is None:
                raise
            raise NeedsGraph(refusal) from None
        finally:
            runtime.deltas = None

    def _has_unknown_code(self) -> bool:
        """Whether the forward runs code of others than the `_SEEN` packages."""
        graph = self._program.graph
        if self._looked_at is not graph:
            self._looked_at = graph
            steps = self._linears.quantised
            seen = (_is_seen(module, id(module) in steps) for _, module in graph.modules())
            self._unknown = not all(seen)
        return self._unknown

    def _labelled_arguments(self, counted: Mapping[int, Tensor], *, watched: bool) -> Memory:
        """A memory with the labels of the call's arguments."""
        program, call = self._program, self._program.call
        rows = len(program.runtime.rows)
        if call is None or call.roles is None or rows > MOST_REQUESTS:
            raise NeedsGraph("which rows its arguments hold is not known")
        memory = Memory(program.shared_in_one_call(), lambda: watched)
        for value in call.named.values():
            if isinstance(value, Pages):
                memory.add_pool(value.pages)
        label_arguments(memory, call.roles, call.named, rows, counted)
        return memory


def _is_seen(module: nn.Module, is_step: bool) -> bool:
    """Whether the module's hooks, and its forward unless that is one step, are code of the `_SEEN`
    packages."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    forward: Any = vars(module).get("forward")
    if type(forward).__module__.startswith("lorafx."):  # such as `generate`'s, around another one
        forward = forward.__wrapped__
    own = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    if forward is not None and not own and cell_of_forward(module) is None:
        return False
    classes = () if is_step else (type(module),)
    code = (*classes, *(hook if callable(hook) else type(hook) for hook in hooks))
    return all(str(item.__module__).partition(".")[0] in _SEEN for item in code)


def _counted(value: Any, counted: dict[int, Tensor]) -> Any:
    """`value`, or a copy of an inference tensor, whose writes are counted."""
    if isinstance(value, Tensor) and value.is_inference() and not isinstance(value, nn.Parameter):
        if id(value) not in counted:
            counted[id(value)] = value.clone()
        return counted[id(value)]
    return value


#: torch's messages, with the index where they tell it. Those of lists, say, are the model's own.
_OUTSIDE = re.compile(
    r"index out of range in self|(?:index|Target) (-?\d+) is out of bounds(?: for dim|\.$)"
)


def _is_of_call(program: Program, error: IndexError) -> bool:
    """Whether an operator has raised the error for an index among the call's arguments."""
    found = _OUTSIDE.search(str(error))
    named = {} if program.call is None else program.call.named
    number = None if found is None else found[1]
    return found is not None and (
        number is None
        or any(
            isinstance(value, Tensor)
            and not value.is_floating_point()
            and bool((value == int(number)).any())
            for value in named.values()
        )
    )


def _ranges_text(program: Program, error: IndexError) -> str:
    named = {} if program.call is None else program.call.named
    ranges = [
        f"{name} {tuple(value.shape)} holds {int(value.min())} to {int(value.max())}"
        for name, value in named.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and value.numel()
    ]
    return f"an index of this call is outside of its table: {error}. {'; '.join(ranges)}"
