"""Checkpoint tensors from their source into the weights of a model, also of one that is serving.

    source ─▶ names ─▶ meanings ─▶ plan (shapes, dtypes, duplicates, what is missing) ─▶ writes
    for each target   boxes that tensors fill, no two of which meet, and which cover it

All of it is planned before the first write. Numbers are compared only where two names mean tied
tensors; they have to be equal. Numbers are written in place, so packed buffers, tied weights and
captured graphs see them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafx.errors import BaseWeightsError, CheckpointError, ConfigError, some
from lorafx.interrupts import undisturbed
from lorafx.model.module_graph import ModuleGraph, storage_key
from lorafx.model.packing import check_packed
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import refresh_other_models
from lorafx.weights.copies import outdated_copies
from lorafx.weights.resolve import Resolver
from lorafx.weights.weight_places import (
    ConvertedGroup,
    Destination,
    GroupMember,
    LoadableLayer,
    Meaning,
    Part,
    Target,
    WeightShape,
    destinations_of,
    meet,
    memory_key,
    methods_of,
)

NamedTensors = Iterable[tuple[str, Tensor]]
#: Arguments of `load_weights`.
Weights = Mapping[str, Tensor] | NamedTensors | Callable[[], NamedTensors] | str | os.PathLike[str]

_Key = tuple[object, ...]

_INDEX = "model.safetensors.index.json"
_SHOWN = 100  # problems in a message
_NAMED = 5  # names in a sentence
_BROKEN = (
    "an update of the base weights was interrupted during its writes, and they are partly "
    "old and partly new; call load_weights again with all weights"
)


@dataclass(frozen=True)
class WeightSource:
    """What `read` gives each time it is called; `stable`: the tensors stay valid."""

    read: Callable[[], Iterable[Any]]
    stable: bool = True

    def pairs(self) -> Iterator[tuple[str, Tensor]]:
        """Its names and tensors, detached. ConfigError for what is no pair of these."""
        for pair in self.read():
            if (
                not isinstance(pair, (tuple, list))
                or len(pair) != 2
                or not isinstance(pair[0], str)
            ):
                raise ConfigError(f"weights are (name, tensor) pairs, got {type(pair).__name__}")
            name, tensor = pair
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
            yield name, tensor.detach()


def source_of(weights: Weights) -> WeightSource:
    """The source of `weights`, which can be read twice. CheckpointError for a path without
    safetensors.

    mapping, list, tuple       read as it is
    safetensors file, folder   mapped into memory
    function of no arguments   called twice; it may fill one buffer again and again
    any other iterable         copied to host memory first
    """
    if isinstance(weights, (str, os.PathLike)):
        files = _files(Path(weights))
        # torch takes an interrupt in the middle for a value that has no shape.
        tensors = [pair for file in files for pair in undisturbed(partial(_mapped, file))]
        return WeightSource(lambda: tensors)
    if isinstance(weights, Mapping):
        return WeightSource(weights.items)
    if isinstance(weights, Sequence):
        return WeightSource(lambda: weights)
    if isinstance(weights, Iterable):
        copies = [
            (name, tensor.clone() if tensor.device.type == "cpu" else tensor.cpu())
            for name, tensor in WeightSource(lambda: weights).pairs()
        ]
        return WeightSource(lambda: copies)
    if callable(weights):
        return WeightSource(weights, stable=False)
    raise ConfigError(
        "weights are (name, tensor) pairs, a mapping, a path of safetensors, or a function that "
        f"gives pairs; got {type(weights).__name__}"
    )


def _mapped(path: Path) -> list[tuple[str, Tensor]]:
    """The tensors of a file, mapped into memory: nothing is read before it is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors files: {error}") from error
        return [path / name for name in dict.fromkeys(named)]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{path} holds no safetensors file")
    return found


class _Planned(NamedTuple):
    meaning: Meaning
    shape: WeightShape
    dtype: torch.dtype


class _Filled(NamedTuple):
    """A part of a target that the checkpoint's `name` fills; `path` is its name in the model,
    `numbers` are the tensor's where the target is tied."""

    part: Part
    name: str
    path: str
    numbers: Tensor | None


def _expert(part: Part) -> int | None:
    """The expert that a box is part of; None for a part of several, or of another weight."""
    if isinstance(part, frozenset) or len(part) < 2 or len(part[0]) != 1:
        return None
    return part[0].start


class Loading:
    """One source: what its tensors mean, which `check` finds out, and their writes.

    Attributes:
        ignored: names that have no place and are no error.
        missing: names of what got no numbers, or only some.
    """

    def __init__(
        self,
        resolver: Resolver,
        source: WeightSource,
        *,
        strict: bool,
        live: bool = True,
        refusals: Callable[[list[Target]], list[str]] | None = None,
    ) -> None:
        """`live`: the model has weights that serve; persistent buffers may be left out then.
        `refusals`: why some targets may not be written."""
        self._resolver, self._source, self._refusals = resolver, source, refusals
        self._strict, self._live = strict, live
        self.ignored: list[str] = []
        self.missing: list[str] = []
        self._problems: list[str] = []
        self._targets = resolver.names.targets
        self._storages = {storage_key(target.tensor) for target in self._targets}
        #: By the checkpoint's name; None where it has no place.
        self._planned: dict[str, _Planned | None] = {}
        #: By target and expert: an expert's box is not compared with those of all others.
        self._filled: dict[_Key, dict[int | None, list[_Filled]]] = {}
        #: By group and its name for a tensor: the checkpoint's name, and the shape.
        self._groups: dict[ConvertedGroup, dict[str, tuple[str, WeightShape]]] = {}
        self._keys: dict[int, _Key] = {}
        self._faulty: set[_Key] = set()

    def check(self) -> None:
        """Plan all of it; BaseWeightsError for all that is wrong."""
        for name, tensor in self._source.pairs():
            self._take(name, tensor)
        if self._refusals is not None:
            self._problems.extend(self._refusals(self.filled))
        self._find_missing()
        self._raise()

    def write(self) -> None:
        """Write all of it. CheckpointError where the second reading differs from the first."""
        remaining = {name: planned for name, planned in self._planned.items() if planned}
        members: dict[ConvertedGroup, dict[str, Tensor]] = {}
        for name, tensor in self._source.pairs():
            if self._planned.get(name) is None:
                continue
            planned = remaining.pop(name, None)
            if planned is None or planned[1:] != (tuple(tensor.shape), tensor.dtype):
                raise CheckpointError(f"{name}: it came as a different tensor the second time")
            if isinstance(planned.meaning, Destination):
                planned.meaning.write(tensor)
                continue
            group, member = planned.meaning
            held = members.setdefault(group, {})
            held[member] = tensor if self._source.stable else tensor.clone()
            if len(held) == len(group.names):
                made = group.joined(members.pop(group))
                for found, tensor in zip(group.destinations, made, strict=True):
                    found.write(tensor)
        if remaining:
            raise CheckpointError(f"{next(iter(remaining))} did not come a second time")

    @property
    def filled(self) -> list[Target]:
        """The targets that got numbers, wholly or partly; of tied ones all."""
        return [target for target in self._targets if self._key(target) in self._filled]

    def _take(self, name: str, tensor: Tensor) -> None:
        if name in self._planned:
            planned = self._planned[name]
            found = destinations_of(None if planned is None else planned.meaning)
            self._fault(f"{name}: a duplicate", found)
            return
        shape = tuple(tensor.shape)
        meaning = self._resolver.meaning(name, shape)
        if meaning is None:
            self._planned[name] = None
            if not self._strict or self._resolver.is_unwanted(name):
                self.ignored.append(name)
            else:
                self._problems.append(f"{name}: {self._resolver.advice(name)}")
            return
        self._planned[name] = _Planned(meaning, shape, tensor.dtype)
        if isinstance(meaning, GroupMember):
            wrong = self._take_member(meaning, name, tensor)
        else:
            wrong = self._take_alone(meaning, name, tensor)
        if not wrong and self._is_own(meaning, tensor):
            wrong = f"{name}: it shares memory with the weights of this model; pass a copy"
        if wrong:
            self._fault(wrong, destinations_of(meaning))

    def _is_own(self, meaning: Meaning, tensor: Tensor) -> bool:
        """Whether a tensor lies in the model's own weights, elsewhere than where it goes."""
        if storage_key(tensor) not in self._storages:
            return False
        places = () if isinstance(meaning, GroupMember) else meaning.places
        return not (places and places[0].is_at(tensor))

    def _find_missing(self) -> None:
        for group, items in self._groups.items():
            lacking = [name for name in group.names if name not in items]
            if lacking:
                self.missing.extend(lacking)
                self._faulty.update(self._keys_of(group.destinations))
                if self._strict:
                    given = ", ".join(name for name, _ in items.values())
                    self._problems.append(f"{given}: needs {some(sorted(lacking), _NAMED)} too")
        seen = set(self._faulty)
        for target in self._targets:
            key = self._key(target)
            needed = not target.is_buffer or (not self._live and target.persistent)
            if not needed or key in seen:
                continue
            seen.add(key)
            uncovered = self._uncovered(target)
            if uncovered:
                self.missing.append(str(target))
                if self._strict:
                    self._problems.append(f"{target}: {uncovered}")

    def _raise(self) -> None:
        if not self._problems:
            return
        shown = "".join(f"\n  - {problem}" for problem in self._problems[:_SHOWN])
        rest = len(self._problems) - _SHOWN
        more = f"\n  - and {rest} more, in this error's `problems`" if rest > 0 else ""
        serving = "; the old weights stay in service" if self._live else ""
        error = BaseWeightsError(
            f"{len(self._problems)} problems with the weights{serving}:{shown}{more}"
        )
        error.problems = tuple(self._problems)
        raise error

    def _take_alone(self, found: Destination, name: str, tensor: Tensor) -> str:
        wrong = found.wrong
        if not wrong and found.shape != tuple(tensor.shape):
            shape = tuple(tensor.shape)
            wrong = f"the checkpoint's tensor has shape {shape}, expected {found.shape}"
        wrong = wrong or _unlike((found,), tensor) or self._fill(found, name, tensor)
        label = name if name == found.path else f"{name} → {found.path}"
        return f"{label}: {wrong}" if wrong else ""

    def _take_member(self, member: GroupMember, name: str, tensor: Tensor) -> str:
        group = member.group
        items = self._groups.setdefault(group, {})
        if member.name in items:
            return f"{name}: a duplicate of {items[member.name][0]}"
        items[member.name] = name, tuple(tensor.shape)
        wrong = next((found.wrong for found in group.destinations if found.wrong), "")
        wrong = wrong or _unlike(group.destinations, tensor)
        if not wrong and len(items) == len(group.names):
            wrong = group.misfit({member: shape for member, (_, shape) in items.items()})
            if not wrong:
                filled = [
                    self._fill(found, name, tensor, alone=False) for found in group.destinations
                ]
                wrong = next(filter(None, filled), "")
        return f"{name} → {group.path}: {wrong}" if wrong else ""

    def _fill(self, found: Destination, name: str, tensor: Tensor, *, alone: bool = True) -> str:
        """Note what a tensor fills; returns why not, where other numbers fill it already."""
        for place in found.places:
            for target, part in place.fills(tensor.dtype):
                key, expert = self._key(target), _expert(part)
                filled = self._filled.setdefault(key, {})
                near = filled if expert is None else (expert, None)
                for earlier in [known for index in near for known in filled.get(index, ())]:
                    if not meet(earlier.part, part):
                        continue
                    tied = earlier.part == part and earlier.path != found.path
                    if not tied or earlier.numbers is None or not alone:
                        return f"a duplicate of {earlier.name}"
                    if not _same(earlier.numbers, tensor[place.take], target.tensor.dtype):
                        return f"the model ties it to {earlier.name}, and their values differ"
                numbers = None
                if alone and self._resolver.names.ways[key] > 1:
                    numbers = (
                        tensor[place.take] if self._source.stable else tensor[place.take].clone()
                    )
                filled.setdefault(expert, []).append(_Filled(part, name, found.path, numbers))
        return ""

    def _uncovered(self, target: Target) -> str:
        by_expert = self._filled.get(self._key(target))
        if by_expert is None:
            return "nothing in the checkpoint"
        parts = [filled.part for found in by_expert.values() for filled in found]
        pieces = [part for part in parts if isinstance(part, frozenset)]
        if pieces:
            assert isinstance(target.module, LoadableLayer)
            lacking = target.module.pieces(target.attribute) - frozenset().union(*pieces)
            absent = sorted(map(str, lacking))
            return f"nothing in the checkpoint for slices {some(absent, _NAMED)}" if absent else ""
        boxes = {part for part in parts if isinstance(part, tuple)}
        got, whole = sum(prod(map(len, box)) for box in boxes), target.tensor.numel()
        if got >= whole:
            return ""
        experts = range(target.tensor.shape[0] if target.tensor.dim() == 3 else 0)
        absent = [str(e) for e in experts if not any(e in box[0] for box in boxes)]
        which = f", nothing for experts {some(absent, _NAMED)}" if absent else ""
        return f"{got} of its {whole} numbers are in the checkpoint{which}"

    def _fault(self, problem: str, found: Iterable[Destination]) -> None:
        self._problems.append(problem)
        self._faulty.update(self._keys_of(found))

    def _keys_of(self, found: Iterable[Destination]) -> Iterator[_Key]:
        return (self._key(place.target) for item in found for place in item.places)

    def _key(self, target: Target) -> _Key:
        tensor = target.tensor
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = memory_key(tensor)
        return self._keys[id(tensor)]


def _unlike(found: Iterable[Destination], tensor: Tensor) -> str:
    refusals = (place.refusal(tensor) for item in found for place in item.places)
    return next(filter(None, refusals), "")


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(device=a.device, dtype=dtype))


def load_weights(model: nn.Module, weights: Weights, strict: bool = True) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, a mapping, a safetensors file or folder, or a function that
            yields pairs, under any of the names that updates take (docs/base_weights.md). All of it
            is checked before anything is written; what can be read only once is copied first.
        strict: tensors that the model has no place for, and parts of it that got no tensor, are
            errors too.

    Returns names of the parameters and buffers that were loaded, wholly or in part; for tied ones
    all names.

    Raises:
        CheckpointError: all unknown, missing, duplicate and misshapen names, in one; or no
            safetensors.
        ConfigError: a malformed `packed_modules_mapping`.
    """
    resolver = Resolver(ModuleGraph(model), model, None)
    loading = Loading(resolver, source_of(weights), strict=strict, live=False)
    loading.check()
    loading.write()
    filled = loading.filled
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    keys = {memory_key(target.tensor) for target in filled}
    state = model.state_dict(keep_vars=True)
    return {n for n, t in state.items() if isinstance(t, Tensor) and memory_key(t) in keys}


@dataclass(frozen=True)
class WeightUpdate:
    """What an update did, by name.

    Attributes:
        loaded: parameters and buffers of the model that got numbers; for tied ones all names.
        missing: parameters that got none or only some, and tensors that lack for a joint place.
        ignored: tensors that the model has no place for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]


def update_weights(session: Session, weights: Weights, *, strict: bool = True) -> WeightUpdate:
    session.refuse_running("load_weights()")
    source = source_of(weights)
    with session.weights_lock, session.lock:
        session.locks.streams.follow(session.accelerators)
        merged = session.base.merged
        if merged is not None:
            raise ConfigError(
                f"{merged.name!r} is merged into the base weights; call unmerge() before "
                "load_weights(), and merge() again after it"
            )
        report = session.update(partial(_update, session, source, strict=strict))
    refresh_other_models(session)
    return report


def _update(session: Session, source: WeightSource, *, strict: bool) -> WeightUpdate:
    program = session.program
    program.look_at_modules()
    program.refuse_missing()
    check_packed(program.packed)
    resolver = Resolver(program.graph, program.model, program.config.packed_modules)

    def refusals(filled: list[Target]) -> list[str]:
        return outdated_copies(program, filled, [module for module, _ in methods_of(filled)])

    loading = Loading(resolver, source, strict=strict, refusals=refusals)
    loading.check()
    filled, before = loading.filled, session.base
    session.base = before._replace(broken=_BROKEN)  # said before it is so
    loading.write()
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    session.store.refresh_magnitudes()
    session.base = before._replace(broken=before.broken if loading.missing else "")
    return WeightUpdate(
        tuple(str(target) for target in filled), tuple(loading.missing), tuple(loading.ignored)
    )
