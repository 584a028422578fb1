"""Runs a call in eager mode, for which no graph is ready.

The model's own forward runs with its marks. In a batch that mixes adapters the owners of rows are
followed through all operators (`lorafx.eager.following`), by the rules that prove a graph. What is
not proved is not guessed: everything that the call has changed is restored, and it needs a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorafx.eager.deltas import Deltas, GatheredFactors
from lorafx.eager.following import Following, NeedsGraph, Remembered
from lorafx.eager.undo import Undo
from lorafx.errors import MatchError, OutOfRangeError, ProvenanceError
from lorafx.ownership.memory import MOST_REQUESTS, Memory
from lorafx.program.argument_roles import tensor_leaves
from lorafx.program.program import Program
from lorafx.program.row_handoff import argument_label

#: The share of the model's bytes that gathered factors may take.
_SHARE = 16


class EagerTier:
    """The eager forwards of a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._remembered = Remembered()
        nbytes = sum(parameter.nbytes for parameter in program.model.parameters())
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
            with torch.inference_mode(False), torch.no_grad():
                return self._followed(target, args, kwargs)
        except IndexError as error:
            if isinstance(error, OutOfRangeError):
                raise
            raise OutOfRangeError(_ranges_text(program, error)) from error

    def _followed(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        program, runtime = self._program, self._program.runtime
        counted: dict[int, Tensor] = {}
        args = tuple(_counted(value, counted) for value in args)
        kwargs = {name: _counted(value, counted) for name, value in kwargs.items()}
        memory = None if runtime.uniform else self._labelled_arguments(counted)
        undo = Undo((*args, *kwargs.values()), runtime.device)
        self._remembered.begin()
        following = Following(program, self._remembered, undo, memory)
        runtime.deltas = Deltas(program, following, self._gathered)
        try:
            return following.run(partial(target, *args, **kwargs))
        except Exception as error:
            refusal = following.refusal
            if refusal is None and isinstance(error, (NeedsGraph, ProvenanceError, MatchError)):
                refusal = str(error)
            if refusal is None:
                raise
            undo.run()
            raise NeedsGraph(refusal) from None
        finally:
            runtime.deltas = None

    def _labelled_arguments(self, counted: Mapping[int, Tensor]) -> Memory:
        """A memory with the labels of the call's arguments."""
        program, call = self._program, self._program.call
        rows = len(program.runtime.rows)
        if call is None or call.roles is None or rows > MOST_REQUESTS:
            raise NeedsGraph("which rows its arguments hold is not known")
        memory = Memory(program.shared_in_one_call(), lambda: False)
        for name, value in call.named.items():
            for tensor in tensor_leaves(value):
                role = call.roles.role(name, tensor, call.named)
                counting = counted.get(id(tensor), tensor)
                memory.set_label(counting, argument_label(role, tensor, rows))
        return memory


def _counted(value: Any, counted: dict[int, Tensor]) -> Any:
    """`value`, or a copy of an inference tensor, whose writes are counted."""
    if isinstance(value, Tensor) and value.is_inference():
        value = counted.setdefault(id(value), value.clone())
    return value


def _ranges_text(program: Program, error: IndexError) -> str:
    named = {} if program.call is None else program.call.named
    ranges = [
        f"{name} {tuple(value.shape)} holds {int(value.min())} to {int(value.max())}"
        for name, value in named.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and value.numel()
    ]
    return f"an index of this call is outside of its table: {error}. {'; '.join(ranges)}"
