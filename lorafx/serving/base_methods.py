"""Methods of a compiled model for its base weights: updates, merging an adapter, export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorafx.base_weights.export_merged import export_merged
from lorafx.base_weights.merge import MergeReport, merge, unmerge
from lorafx.base_weights.update import WeightUpdate, update_weights
from lorafx.loading.sources import Weights
from lorafx.loading.writer import Undo

if TYPE_CHECKING:
    from lorafx.session.session import Session


class BaseMethods:
    """The part of `CompiledModel` that is about base weights."""

    _session: Session

    def _check_attached(self) -> None:
        """Raise CaptureError where the model was detached."""
        raise NotImplementedError

    def load_weights(
        self, weights: Weights, *, strict: bool = True, undo: Undo = "memory"
    ) -> WeightUpdate:
        """Update the base weights in place, under any naming that a trainer produces.

        Nothing is compiled again, addresses and adapters stay, and everything that depends on the
        weights follows: packed and tied ones, copies of absorbed ones, a merged adapter. Waits for
        running calls. Names may have `base_model.model.`, `_orig_mod.`, `module.` and
        `.base_layer.` in them, be any alias, be from before a renaming in transformers, and mean
        one expert, one half, or one member of a packed projection, or several together.

        Args:
            weights: (name, tensor) pairs, a mapping, a safetensors file or folder, or a function
                of no arguments that gives pairs. All of them are checked as a whole before the
                first write and need no further memory, but a pair that is read once more (a list
                or mapping may hold any tensors; a function is called twice, and may fill one
                buffer again and again). A generator can be taken only as it comes: what the
                weights were is kept until all of it was right.
            strict: unknown names, and parameters that get nothing, are errors too. Without it
                they are reported.
            undo: where a generator's update keeps what the weights were: in host "memory" or in
                temporary files on "disk".

        Returns:
            The names that were loaded, missing and ignored.

        Raises:
            BaseWeightsError: unknown, duplicate, missing and misshapen names, numbers of another
                kind (floats for a quantised weight), different values for tied weights: all of
                them at once. The old weights serve on.
            ConfigError: `weights` is nothing of the above.
            BatchError: a call, or another update, is running on this thread.
            MatchError: an adapter is merged, and cannot be merged into the new weights. They are
                loaded; calls are refused until `merge` or `unmerge`.
            Whatever iterating over `weights` raises. In the second round over a function, or while
            files are read, weights are partly written then: calls are refused until an update
            succeeds.
        """
        self._check_attached()
        return update_weights(self._session, weights, strict=strict, undo=undo)

    def merge(self, name: str, *, requantize: bool = False) -> MergeReport:
        """Add an adapter to the base weights, in place: calls run at the speed of the base model.

        Until `unmerge` all calls are served by this adapter, whether they name it or none; a call
        that names another one or the base is refused. Others stay loaded. Graphs, addresses and
        the model's own modules stay; `model` called by itself is the merged model.

        Args:
            name: a loaded adapter.
            requantize: where W is quantised, store W + ΔW in its own format, which loses some of
                ΔW, or most of it: see `MergeReport`. Otherwise such weights are refused.

        Returns:
            What holds W + ΔW now, what rounding to its dtype has cost, and the memory that the
            originals take: as many bytes of the host as the changed weights have.

        Raises:
            UnknownAdapterError: it is not loaded.
            ConfigError: one is merged already, or another one is the default of `set_adapter`.
            BatchError: a call is running on this thread.
            MatchError: a weight cannot take ΔW: quantised, tied to one that gets another ΔW,
                held by another model in service, copied in a form that is not understood, or
                beyond its dtype's range.
            Nothing has changed then.
        """
        self._check_attached()
        return merge(self._session, name, requantize=requantize)

    def unmerge(self, *, force: bool = False) -> None:
        """Put the base's own weights back, bit for bit; adapters are served side by side again.

        Args:
            force: also where weights have been written since the merge by something else than
                `load_weights`, which is lost then. Weights that were replaced by other tensors
                are left as they are.

        Raises:
            ConfigError: no adapter is merged.
            BatchError: a call is running on this thread.
            CaptureError: weights were written or replaced since, and not `force`.
        """
        unmerge(self._session, force=force)

    @property
    def merged(self) -> str | None:
        """The adapter that is merged into the base weights, if any."""
        merged = self._session.base.merged
        return None if merged is None else merged.name

    def export_merged(
        self, name: str, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> Path:
        """Write the model with an adapter merged, for `from_pretrained`; the model stays as it is.

        Other threads are served meanwhile. A transformers model is written by its own
        `save_pretrained`, with its configurations; any other module as one `model.safetensors`
        with the names of its `state_dict()`. Tied weights that the adapter tells apart are
        written as two, and the configuration then says that they are not tied.

        Args:
            name: a loaded adapter.
            folder: created where it is missing. While this runs it also holds a file for each
                changed weight, so that no second copy of the model lies in memory.
            max_shard_size: of one file of a transformers model.

        Returns:
            The folder.

        Raises:
            UnknownAdapterError: it is not loaded.
            MatchError: a weight cannot take ΔW (as for `merge`), or the module has no
                configuration that could say that tied weights are not tied.
            CheckpointError: the folder cannot be written.
        """
        self._check_attached()
        return export_merged(self._session, name, Path(folder), max_shard_size=max_shard_size)
