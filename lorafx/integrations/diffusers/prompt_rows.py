"""Which prompt each row belongs to that a pipeline computes with.

    embeddings[b]               prompt b: what an encoder returns for row b of the prompts
    noise[i]                    a label of its own, until the denoiser is called with it
    cat, repeat, view, chunk    whatever the pipeline does with them is followed, element by element

A row of the denoiser is the prompt's whose embeddings it has. A row whose embeddings are nobody's
(zeros, for an empty prompt) is the prompt's with whose other row it shares the noise. What neither
says is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorafx.capture.tracking import Tracking, untracked
from lorafx.errors import BatchError
from lorafx.ownership.memory import (
    MOST_REQUESTS,
    NOBODY,
    Alone,
    Listed,
    Memory,
    Patchy,
    RealLabel,
    listed,
)
from lorafx.ownership.real import tensors_in
from lorafx.program.argument_roles import tensor_leaves
from lorafx.torch_internals.graph_parts import OpOverload

T = TypeVar("T")


class PromptRows:
    """The labels of one call of a pipeline. Those below `prompts`, their number, are prompts; those
    above are rows of noise whose prompt is not known yet."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        # What no operator made, and nobody gave (a schedule from numpy), says nothing of prompts.
        self._memory = Memory(lambda _: True)
        self._next = prompts
        #: The denoiser has been called: noise that is added later says nothing new.
        self._begun = False

    def run(self, action: Callable[[], T]) -> T:
        return _Following(self, self._memory).run(action)

    def given(self, name: str, value: Any) -> None:
        """Label an argument of the pipeline: what is given for prompts has a row for each, anything
        else (noise to begin with) rows that nobody knows yet."""
        if "prompt" in name:
            self.of_prompts(value)
        else:
            for tensor in tensor_leaves(value):
                self.of_noise(tensor)

    def of_prompts(self, value: Any) -> None:
        """Row b of each tensor in `value` belongs to prompt b."""
        self.of_rows(value, tuple(range(self.prompts)))

    def of_rows(self, value: Any, owners: tuple[int, ...]) -> None:
        """Row i of each tensor in `value` belongs to prompt owners[i]."""
        for tensor in tensor_leaves(value):
            if tensor.dim() and tensor.shape[0] == len(owners):
                self._memory.set_label(tensor, listed(0, owners))

    def of_noise(self, tensor: Tensor) -> None:
        """`tensor` has rows of which nobody knows yet whose they are."""
        count = tensor.shape[0] if tensor.dim() else 0
        if not self._begun and 0 < count <= MOST_REQUESTS - self._next:
            first, self._next = self._next, self._next + count
            self._memory.set_label(tensor, listed(0, tuple(range(first, first + count))))

    def owners(self, what: str, values: Any, count: int) -> tuple[int, ...]:
        """The prompt of each of the `count` rows that `what` is called with; BatchError where what
        a row is computed from says nothing of its prompt, or names several."""
        labels = untracked(lambda _: self._labels(values, count))
        # Labels of noise -> the prompt of the rows that have it; NOBODY where it is several
        # prompts', which may begin with the same noise.
        users: dict[int, set[int]] = {}
        for of_row in labels:
            owned = {label for label in of_row if label < self.prompts}
            for label in of_row - owned if owned else ():
                users.setdefault(label, set()).update(owned)
        known = {
            label: next(iter(owned)) if len(owned) == 1 else NOBODY
            for label, owned in users.items()
        }
        prompts = [
            {known.get(label, label) for label in of_row} & set(range(self.prompts))
            for of_row in labels
        ]
        lost = [row for row, of_row in enumerate(prompts) if len(of_row) != 1]
        if lost:
            several = any(prompts[row] for row in lost)
            why = "its arguments name several prompts for" if several else "nothing says whose are"
            raise BatchError(
                f"{what} is called with {count} rows for {self.prompts} prompts, and {why} row "
                f"{', '.join(map(str, lost[:4]))}. Prompts with "
                "different adapters need embeddings that come from the pipeline's text encoders "
                "or are given per prompt; call the pipeline once for each adapter otherwise"
            )
        untracked(lambda _: self._memory.rename(known))
        self._begun = True
        return tuple(of_row.pop() for of_row in prompts)

    def _labels(self, values: Any, count: int) -> list[set[int]]:
        """The labels of each row of the tensors in `values`."""
        found: list[set[int]] = [set() for _ in range(count)]
        for tensor in tensor_leaves(values):
            if tensor.dim() and tensor.shape[0] == count:
                for of_row, label in zip(found, self._by_row(tensor), strict=True):
                    of_row |= {label} - {NOBODY}
        return found

    def _by_row(self, tensor: Tensor) -> Sequence[int]:
        """The label of each row; NOBODY where it has none, or more than one."""
        held: RealLabel | None = self._memory.look(tensor)
        rows = tensor.shape[0]
        if isinstance(held, Alone):
            return [held.request] * rows
        if isinstance(held, Listed) and held.dim == 0:
            return held.owners
        if isinstance(held, Patchy):
            cells = held.cells.expand(tensor.shape).reshape(rows, -1)
            most = cells.amax(1)
            least = cells.masked_fill(cells == NOBODY, MOST_REQUESTS).amin(1)
            labels: list[int] = torch.where(least == most, most, NOBODY).tolist()
            return labels
        return [NOBODY] * rows


def counted(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it was made in inference mode: torch counts no writes into such a
    tensor, so nothing can be known of it for long."""
    return tensor.clone() if tensor.is_inference() else tensor


class _Following(Tracking):
    """Tracking that tells the rows of noise apart."""

    def __init__(self, rows: PromptRows, memory: Memory) -> None:
        super().__init__(memory)
        self._rows = rows

    def _made(self, func: OpOverload, results: object) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            for tensor in tensors_in(results):
                self._rows.of_noise(tensor)
