"""From prompts to rows of the denoiser: owners are followed through the pipeline's own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorafx.eager.following import Following, unfollowed
from lorafx.errors import (
    BatchError,
)
from lorafx.ownership.effects import tensors_in
from lorafx.ownership.labels import One
from lorafx.ownership.memory import Memory
from lorafx.ownership.real_labels import MOST_REQUESTS, NOBODY, Listed, Patchy, RealLabel, listed
from lorafx.program.argument_roles import tensor_leaves
from lorafx.torch_internals.graph_parts import OpOverload

T = TypeVar("T")


class PromptRows:
    """Which prompt each row of a tensor belongs to, during one call of a pipeline.

    `prompts` is the number of prompts. A label below it is the index of a prompt; a higher label is
    a row of noise whose prompt is not known yet.

        embeddings[b]               prompt b: an encoder returns row b for prompt b
        noise[i]                    a new label, until the denoiser is called with this noise
        cat, repeat, view, chunk    labels are propagated element by element

    A row of the denoiser belongs to the prompt of its embeddings. If these have no label (zeros,
    for an empty prompt), it belongs to the prompt whose other row has the same noise. The call is
    refused if neither identifies a prompt.
    """

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        # A tensor of unknown origin, such as a schedule from numpy, depends on no prompt.
        self._memory = Memory(lambda _: True)
        self._next = prompts
        #: Noise drawn after the denoiser's first call identifies no rows and gets no labels.
        self._denoiser_called = False

    def run(self, action: Callable[[], T]) -> T:
        return _NoiseFollowing(self, self._memory).run(action)

    def label_argument(self, name: str, value: Any) -> None:
        """Label an argument: `*prompt*` has a row for each prompt, any other is noise."""
        if "prompt" in name:
            self.label_prompts(value)
        else:
            for tensor in tensor_leaves(value):
                self.label_noise(tensor)

    def label_prompts(self, value: Any) -> None:
        """Record that row b of each tensor in `value` belongs to prompt b."""
        self.label_rows(value, tuple(range(self.prompts)))

    def label_rows(self, value: Any, owners: tuple[int, ...]) -> None:
        """Record that row i of each tensor in `value` belongs to prompt owners[i]."""
        for tensor in tensor_leaves(value):
            if tensor.dim() and tensor.shape[0] == len(owners):
                self._memory.set_label(tensor, listed(0, owners))

    def label_noise(self, tensor: Tensor) -> None:
        """Give each row of `tensor` a new label, whose prompt is not known yet."""
        count = tensor.shape[0] if tensor.dim() else 0
        if not self._denoiser_called and 0 < count <= MOST_REQUESTS - self._next:
            first, self._next = self._next, self._next + count
            self._memory.set_label(tensor, listed(0, tuple(range(first, first + count))))

    def owners(self, title: str, values: Any, count: int) -> tuple[int, ...]:
        """The prompt of each of the `count` rows of the denoiser's arguments, `values`; `title`
        names the denoiser. Raises BatchError if the labels of a row name no prompt, or several."""
        labels = unfollowed(lambda _: self._labels_by_row(values, count))
        # Several prompts may start from the same noise, which then identifies none of them.
        sharing: dict[int, set[int]] = {}
        for row_labels in labels:
            owned = {label for label in row_labels if label < self.prompts}
            for label in row_labels - owned if owned else ():
                sharing.setdefault(label, set()).update(owned)
        prompt_of_noise = {
            label: next(iter(owned)) if len(owned) == 1 else NOBODY
            for label, owned in sharing.items()
        }
        prompts = [
            {prompt_of_noise.get(label, label) for label in row_labels} & set(range(self.prompts))
            for row_labels in labels
        ]
        lost = [row for row, of_row in enumerate(prompts) if len(of_row) != 1]
        if lost:
            several = any(prompts[row] for row in lost)
            why = "its arguments name several prompts for" if several else "no prompt is known for"
            raise BatchError(
                f"{title} is called with {count} rows for {self.prompts} prompts, and {why} row "
                f"{', '.join(map(str, lost[:4]))}. Prompts with "
                "different adapters need embeddings that come from the pipeline's text encoders "
                "or are given per prompt; call the pipeline once for each adapter otherwise"
            )
        unfollowed(lambda _: self._memory.rename(prompt_of_noise))
        self._denoiser_called = True
        return tuple(of_row.pop() for of_row in prompts)

    def _labels_by_row(self, values: Any, count: int) -> list[set[int]]:
        """The labels of each row, of all tensors in `values` that have `count` rows."""
        labels: list[set[int]] = [set() for _ in range(count)]
        for tensor in tensor_leaves(values):
            if tensor.dim() and tensor.shape[0] == count:
                for row_labels, label in zip(labels, self._row_labels(tensor), strict=True):
                    row_labels |= {label} - {NOBODY}
        return labels

    def _row_labels(self, tensor: Tensor) -> Sequence[int]:
        """The label of each row; NOBODY for a row without one, or with more than one."""
        label: RealLabel | None = self._memory.look(tensor)
        rows = tensor.shape[0]
        if isinstance(label, One):
            return [label.request] * rows
        if isinstance(label, Listed) and label.dim == 0:
            return label.owners
        if isinstance(label, Patchy):
            cells = label.cells.expand(tensor.shape).reshape(rows, -1)
            most = cells.amax(1)
            least = cells.masked_fill(cells == NOBODY, MOST_REQUESTS).amin(1)
            labels: list[int] = torch.where(least == most, most, NOBODY).tolist()
            return labels
        return [NOBODY] * rows


class _NoiseFollowing(Following):
    """Following that labels the results of random operators as noise."""

    def __init__(self, rows: PromptRows, memory: Memory) -> None:
        super().__init__(memory)
        self._rows = rows

    def _note_made_of_nothing(self, func: OpOverload, results: object) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            for tensor in tensors_in(results):
                self._rows.label_noise(tensor)
