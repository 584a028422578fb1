"""Methods of a compiled model for its base weights: updates, merging an adapter, export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorafx.weights.export_merged import export_merged
from lorafx.weights.merge import MergeReport, merge, unmerge
from lorafx.weights.sources import Weights
from lorafx.weights.update import WeightUpdate, update_weights

if TYPE_CHECKING:
    from lorafx.runtime.entry import CompiledForwards
    from lorafx.runtime.session import Session


class BaseMethods:
    """The part of `CompiledModel` that is about base weights."""

    _session: Session
    _entries: CompiledForwards

    def load_weights(self, weights: Weights, *, strict: bool = True) -> WeightUpdate:
        """Update the base weights in place, under any naming that a trainer produces.

        Nothing is compiled again, and addresses and adapters stay. Everything that depends on the
        weights is updated too: packed and tied weights, copies of absorbed ones, a merged adapter.
        The update waits for running calls. Names may contain `base_model.model.`, `_orig_mod.`,
        `module.` and `.base_layer.`, be any alias, or come from before a renaming in transformers.
        A name may mean one expert, one half or one member of a packed projection, or several
        together.

        Args:
            weights: (name, tensor) pairs, a mapping, a safetensors file or folder, or a function
                without arguments that yields pairs. Each of these is checked as a whole before the
                first write and needs no further memory, except for one tensor at a time of files
                and functions. A function is called twice, and may fill one buffer again and again.
                A generator can be read only once, so its tensors are copied to host memory first.
            strict: unknown names, and parameters that get nothing, are errors too. Without it
                they are reported.

        Returns:
            The names that were loaded, missing and ignored.

        Raises:
            BaseWeightsError: unknown, duplicate, missing and misshapen names, numbers of another
                kind (floats for a quantised weight), different values for tied weights: all
                problems at once. The old weights stay in service.
            ConfigError: `weights` is none of the above.
            BatchError: a call, or another update, is running on this thread.
            MatchError: an adapter is merged, and cannot be merged into the new weights. They are
                loaded; calls are refused until `merge` or `unmerge`.

        It also raises what iterating over `weights` raises. If that happens in the second round
        over a function, or while files are read, weights are partly written, and calls are refused
        until an update succeeds.
        """
        self._entries.check_attached()
        return update_weights(self._session, weights, strict=strict)

    def merge(self, name: str, *, requantize: bool = False) -> MergeReport:
        """Add an adapter to the base weights, in place: calls run at the speed of the base model.

        Until `unmerge`, this adapter serves all calls, whether they name it or nothing; a call that
        names another adapter or the base is refused. Other adapters stay loaded. Graphs, addresses
        and the model's own modules stay; `model`, called directly, is the merged model.

        Args:
            name: a loaded adapter.
            requantize: store W + ΔW in the format of W where W is quantised. That loses a part of
                ΔW, perhaps most of it; see `MergeReport`. Otherwise quantised weights are refused.

        Returns:
            The weights that hold W + ΔW now, what rounding to their dtype has cost, and the memory
            that the originals take: as many bytes of host memory as the changed weights have.

        Raises:
            UnknownAdapterError: it is not loaded.
            ConfigError: an adapter is already merged, or another one is the default of
                `set_adapter`.
            BatchError: a call is running on this thread.
            MatchError: a weight cannot take ΔW: quantised, tied to one that gets another ΔW,
                held by another model in service, copied in an unsupported form, or beyond the range
                of its dtype.

        Nothing has changed then.
        """
        self._entries.check_attached()
        return merge(self._session, name, requantize=requantize)

    def unmerge(self, *, force: bool = False) -> None:
        """Put the base's own weights back, bit for bit; adapters can be mixed in batches again.

        Args:
            force: unmerge even if something other than `load_weights` has written weights since the
                merge; those writes are lost. Weights that were replaced by other tensors are left
                as they are.

        Raises:
            ConfigError: no adapter is merged.
            BatchError: a call is running on this thread.
            CaptureError: weights were written or replaced since the merge, and `force` is not set.
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
        with the names of its `state_dict()`. Tied weights that the adapter changes differently are
        written as two, and the configuration then says that they are not tied.

        Args:
            name: a loaded adapter.
            folder: created if it is missing. While this runs it also holds one file for each
                changed weight, so that no second copy of the model is in memory.
            max_shard_size: of one file of a transformers model.

        Returns:
            The folder.

        Raises:
            UnknownAdapterError: it is not loaded.
            MatchError: a weight cannot take ΔW (as for `merge`), or the module has no configuration
                that could declare tied weights untied.
            CheckpointError: the folder cannot be written.
        """
        self._entries.check_attached()
        return export_merged(self._session, name, Path(folder), max_shard_size=max_shard_size)
