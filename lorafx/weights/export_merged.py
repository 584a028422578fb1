"""Writes a checkpoint of W + ΔW without changing the model.

    state_dict()  ─▶  changed weights: W + ΔW, each in a separate file that is mapped into memory
                      all others: the model's own tensors
                  ─▶  the model's save_pretrained(state_dict=...), or one safetensors file

About one merged tensor is in memory at a time. A tied weight whose ends the adapter changes
differently becomes two tensors, and the configuration that is written says so.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafx.errors import CheckpointError, ConfigError
from lorafx.progress import progress
from lorafx.weights.changes import Change, changes_of, key_of, not_mergeable
from lorafx.weights.delta import Delta, add_to
from lorafx.weights.targets import memory_key

if TYPE_CHECKING:
    from lorafx.program.program import Program
    from lorafx.runtime.session import Session

FILE = "model.safetensors"


def export_merged(session: Session, name: str, folder: Path, *, max_shard_size: int | str) -> Path:
    program = session.program
    session.refuse_running("export_merged()")
    # Meanwhile weights do not change, and calls continue.
    with session.store.fetch([name], resident=True), session.weights_lock:
        with session.lock:
            session.refuse_broken()
            session.store[name]  # UnknownAdapterError
            program.look_at_modules()
            program.refuse_missing()
            merged, changes = session.base.merged, list[Change]()
            if merged is None:
                changes = changes_of(program, session.store, name)
            elif merged.name != name:
                raise ConfigError(
                    f"{merged.name!r} is merged; call unmerge() before {name!r} is written"
                )
            untie = any(change.tied_apart for change in changes)
            _refuse_unexportable(program, name, changes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".merging-", dir=folder) as temporary:
                state = _State(program, Path(temporary), name)
                with progress(f"export of {name}: merging {len(changes)} weights"):
                    tensors = state.merged(changes, apart=untie or not _saves_state(program.model))
                with progress(f"export of {name}: writing {len(tensors)} tensors to {folder}"):
                    if _saves_state(program.model):
                        copied = _shallow_copy(program.model, untie=untie)
                        copied.save_pretrained(
                            str(folder), state_dict=tensors, max_shard_size=max_shard_size
                        )
                    else:
                        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be written: {error}") from error
    return folder


def _saves_state(model: nn.Module) -> bool:
    save = getattr(model, "save_pretrained", None)
    return callable(save) and "state_dict" in inspect.signature(save).parameters


def _refuse_unexportable(program: Program, name: str, changes: Sequence[Change]) -> None:
    model, problems = program.model, list[str]()
    if getattr(model, "hf_quantizer", None) is not None:
        problems.append(
            "the model is quantised, and its own save_pretrained takes no merged weights"
        )
    for site in program.sites:
        if site.eligible.sharding is not None:
            k, sizes = site.eligible.sharding.saved_sizes(site.module)
            if (k, sum(sizes)) != (site.in_features, site.out_features):
                problems.append(
                    f"{site.path}: this rank holds only a share of its weight; export on a single "
                    "rank"
                )
    config, why = getattr(model, "config", None), ""
    if not (_saves_state(model) and hasattr(config, "tie_word_embeddings")):
        why = "the model has no configuration that could declare them untied"
    elif getattr(config, "is_encoder_decoder", False):
        why = "in encoder-decoder models the flag that unties them also changes what is computed"
    problems += [
        f"{', '.join(str(holder) for holder, _ in change.ends)} are one tensor, but the adapter "
        f"changes its ends differently, and {why}"
        for change in changes
        if why and change.tied_apart
    ]
    if problems:
        raise not_mergeable(name, problems)


def _shallow_copy(model: Any, *, untie: bool) -> Any:
    """A shallow copy of the model, with its own configurations, which saving changes."""
    copied = copy.copy(model)
    copied.config = copy.deepcopy(model.config)
    if getattr(model, "generation_config", None) is not None:
        copied.generation_config = copy.deepcopy(model.generation_config)
    if untie:
        for config in _configs(copied.config):
            config.tie_word_embeddings = False
    return copied


def _configs(config: Any) -> Iterator[Any]:
    if getattr(config, "tie_word_embeddings", False):
        yield config
    for value in list(vars(config).values()):
        if hasattr(value, "tie_word_embeddings"):
            yield from _configs(value)


@dataclass
class _State:
    """Makes the state dict of the merged model; `folder` is for mapped files."""

    program: Program
    folder: Path
    name: str
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def merged(self, changes: Sequence[Change], *, apart: bool) -> dict[str, Tensor]:
        """Tensors by their names in `state_dict()`; with `apart`, tied names get one each."""
        state = self.program.model.state_dict(keep_vars=True)
        other = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
        if other is not None:
            raise not_mergeable(self.name, [f"state_dict()[{other!r}] holds no tensor"])
        changed = {memory_key(change.tensor): change for change in changes}
        merged, tensors = dict[int, Tensor](), dict[str, Tensor]()
        seen: set[tuple[object, ...]] = set()
        for key, value in state.items():
            memory = memory_key(value)
            change = changed.get(memory)
            if change is not None:
                if id(change) not in merged or apart:
                    merged[id(change)] = self._merged_tensor(key, change)
                tensors[key] = merged[id(change)]
                continue
            self._refuse_derived(key, value, changes)
            tensor = value.detach()
            is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
            copied = is_view or not tensor.is_contiguous() or (apart and memory in seen)
            tensors[key] = self._mapped_copy(tensor) if copied else tensor
            seen.add(memory)
        missing = [str(change.holder) for change in changes if id(change) not in merged]
        if missing:
            raise not_mergeable(
                self.name, [f"{holder}: state_dict() does not hold it" for holder in missing]
            )
        return tensors

    def _merged_tensor(self, key: str, change: Change) -> Tensor:
        delta: Delta | None = change.delta
        if change.tied_apart:
            path, _, attribute = key.rpartition(".")
            module = self.program.graph.find(path)
            if module is None:
                raise not_mergeable(self.name, [f"state_dict()[{key!r}] is at no module"])
            holder_key = (id(module), attribute)
            delta = next((d for end, d in change.ends if key_of(end) == holder_key), None)
        if delta is None:
            return self._mapped_copy(change.tensor.detach())
        target = self._mapped_like(change.tensor)
        add_to(target, change.tensor, delta, str(change.holder))
        return target

    def _refuse_derived(self, key: str, value: Tensor, changes: Sequence[Change]) -> None:
        derived = self.program.derived.look(value) if value.dim() > 1 and changes else None
        sites = () if derived is None else derived.sites
        weights = [self.program.weight_of(site) for site in sites]
        change = next((c for c in changes if any(c.weight is weight for weight in weights)), None)
        if change is not None:
            why = f"{key} was made from {change.holder}, and would keep the old numbers"
            raise not_mergeable(self.name, [why])

    def _mapped_copy(self, numbers: Tensor) -> Tensor:
        copy = self._mapped_like(numbers)
        copy.copy_(numbers)
        return copy

    def _mapped_like(self, like: Tensor) -> Tensor:
        """A contiguous tensor in a mapped file, of the shape and dtype of `like`. Disk space is
        allocated at once, or OSError raised: a page without it would kill the process (SIGBUS)."""
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        file = self.folder / str(next(self.numbers))
        with file.open("wb") as content:
            os.posix_fallocate(content.fileno(), 0, like.numel() * like.element_size())
        mapped = torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype)
        return mapped.view(like.shape)
