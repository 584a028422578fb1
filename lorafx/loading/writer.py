"""Writes into the weights of a model, which can be undone on request."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.interrupts import Rollback
from lorafx.loading.groups import TensorGroup
from lorafx.loading.resolve import Meaning
from lorafx.loading.sources import in_file
from lorafx.loading.weight_places import Landing, is_expanded, memory_key
from lorafx.model.module_graph import writing

Undo = Literal["memory", "disk"]


class UndoLog:
    """The numbers that tensors had before they were first written to, to be put back.

    They are kept in host memory, or with "disk" in files of a temporary folder, whose pages the
    system may write out and forget.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._saved: set[tuple[object, ...]] = set()
        self._rollback = Rollback()

    @classmethod
    @contextmanager
    def kept(cls, undo: Undo) -> Iterator[UndoLog]:
        """An undo log for the block."""
        if undo == "memory":
            yield cls(None)
            return
        with tempfile.TemporaryDirectory(prefix="lorafx-weights-") as folder:
            yield cls(Path(folder))

    def save(self, tensor: Tensor) -> None:
        """Keep the numbers of a tensor, unless they are kept already."""
        key = memory_key(tensor)
        if key not in self._saved:
            self._rollback.add(partial(_write_back, tensor, self._copy(tensor.detach())))
            self._saved.add(key)

    def save_held(self, module: nn.Module) -> None:
        """Keep what a module holds by itself: which tensors, and their numbers."""
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for place in places:
            for name, tensor in place.items():
                if isinstance(tensor, Tensor):
                    self._rollback.add(partial(place.__setitem__, name, tensor))
                    if not tensor.is_meta and not is_expanded(tensor):
                        self.save(tensor)

    def restore(self) -> None:
        """Put back what was kept."""
        self._rollback.run()
        self._saved.clear()

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._folder is None or not tensor.numel():
            return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
        file = self._folder / str(len(self._saved))
        try:
            numbers = in_file(file, tensor)
        except OSError as error:
            raise CheckpointError(
                f"the old weights cannot be kept on disk until the update has ended: {error}. "
                "TMPDIR names a folder with room; undo='memory' keeps them in host memory"
            ) from error
        numbers.copy_(tensor)
        return numbers


def _write_back(tensor: Tensor, numbers: Tensor) -> None:
    with writing(tensor):
        tensor.detach().copy_(numbers)


class Writer:
    """Writes tensors to their places; of a group all, when the last one arrives."""

    def __init__(self, undo_log: UndoLog | None, *, stable: bool) -> None:
        """`stable`: tensors of groups stay as they were given until the group is whole."""
        self._undo_log, self._stable = undo_log, stable
        self._held: dict[TensorGroup, dict[str, Tensor]] = {}

    def put(self, meaning: Meaning, loaded: Tensor) -> None:
        """Write a tensor, or keep it until its group is whole."""
        if isinstance(meaning, Landing):
            self._write(meaning, loaded)
            return
        held = self._held.setdefault(meaning.group, {})
        held[meaning.name] = loaded if self._stable else loaded.clone()
        if len(held) == len(meaning.group.names):
            made = meaning.group.joined(self._held.pop(meaning.group))
            for landing, tensor in zip(meaning.group.landings, made, strict=True):
                self._write(landing, tensor)

    def _write(self, landing: Landing, loaded: Tensor) -> None:
        if self._undo_log is not None:
            for cut in landing.cuts:
                for target, _ in cut.place.fills(loaded.dtype):
                    self._undo_log.save(target.tensor)
        landing.write(loaded)
