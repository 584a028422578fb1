"""Loads checkpoint tensors into the weights of a model, which may be in service.

    source ─▶ names ─▶ meanings ─▶ plan (shapes, dtypes, duplicates, missing tensors) ─▶ writes
    for each target   boxes that tensors fill, which do not overlap, and together cover it

Everything is planned before the first write. Numbers are compared only if two names mean tied
tensors, which have to be equal. Numbers are written in place, so packed buffers, tied weights and
captured graphs see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafx.errors import BaseWeightsError, CheckpointError, ConfigError, some
from lorafx.model.module_graph import ModuleGraph, storage_key
from lorafx.model.packing import check_packed
from lorafx.model.weight_formats import is_wrapped
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import refresh_other_models
from lorafx.weights.copies import outdated_copies
from lorafx.weights.loadable_layers import LoadableLayer, methods_of
from lorafx.weights.resolve import Resolver
from lorafx.weights.targets import Part, Target, WeightShape, held, memory_key, overlapping
from lorafx.weights.weight_places import (
    Conversion,
    ConversionMember,
    Destination,
    Meaning,
    destinations_of,
)
from lorafx.weights.weight_sources import Weights, WeightSource, source_of

_Key = tuple[object, ...]

_SHOWN = 100  # problems in a message
_NAMED = 5  # names in a sentence
_BROKEN = (
    "an update of the base weights was interrupted during its writes, and they are partly "
    "old and partly new; call load_weights again with all weights"
)


class _Planned(NamedTuple):
    meaning: Meaning
    shape: WeightShape
    dtype: torch.dtype


class _Filled(NamedTuple):
    """A part of a target that the checkpoint's tensor `name` fills, called `path` in the model; if
    the target is tied, with its `numbers`."""

    part: Part
    name: str
    path: str
    numbers: Tensor | None


def _expert(part: Part) -> int | None:
    """The expert to which a box belongs; None for a box of several, or of another weight."""
    if isinstance(part, frozenset) or len(part) < 2 or len(part[0]) != 1:
        return None
    return part[0].start


class Loading:
    """Plans the loading of one source in `check`, and does it in `write`.

    Attributes:
        ignored: names that have no place and are no error.
        missing: names of targets that got no numbers, or only some.
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
        """`live`: the model is in service, so persistent buffers may be absent. `refusals` returns
        reasons why some of the targets must not be written."""
        self._resolver, self._source, self._refusals = resolver, source, refusals
        self._strict, self._live = strict, live
        self.ignored: list[str] = []
        self.missing: list[str] = []
        self._problems: list[str] = []
        self._targets = resolver.names.targets
        self._storages = {storage_key(held(target.tensor)) for target in self._targets}
        #: By the checkpoint's name; None for a tensor without a place.
        self._planned: dict[str, _Planned | None] = {}
        #: By target and expert, so that a box is not compared with those of all other experts.
        self._filled: dict[_Key, dict[int | None, list[_Filled]]] = {}
        #: By group and its name for a tensor, the checkpoint's name and the shape.
        self._groups: dict[Conversion, dict[str, tuple[str, WeightShape]]] = {}
        self._keys: dict[int, _Key] = {}
        self._faulty: set[_Key] = set()

    def check(self) -> None:
        """Plan everything. Raises BaseWeightsError with all problems."""
        for name, tensor in self._source.pairs():
            self._plan(name, tensor)
        if self._refusals is not None:
            self._problems.extend(self._refusals(self.filled))
        self._find_missing()
        self._raise_problems()

    def write(self) -> None:
        """Write everything. CheckpointError if the second reading differs from the first."""
        remaining = {name: planned for name, planned in self._planned.items() if planned}
        members: dict[Conversion, dict[str, Tensor]] = {}
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
            tensors = members.setdefault(group, {})
            tensors[member] = tensor if self._source.stable else tensor.clone()
            if len(tensors) == len(group.names):
                converted = group.converted(members.pop(group))
                for target, tensor in zip(group.destinations, converted, strict=True):
                    target.write(tensor)
        if remaining:
            raise CheckpointError(f"{next(iter(remaining))} did not come a second time")

    @property
    def filled(self) -> list[Target]:
        """The targets that got numbers, in full or in part, with all that are tied to them."""
        return [target for target in self._targets if self._key(target) in self._filled]

    def _plan(self, name: str, tensor: Tensor) -> None:
        if name in self._planned:
            planned = self._planned[name]
            destinations = destinations_of(None if planned is None else planned.meaning)
            self._note_problem(f"{name}: a duplicate", destinations)
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
        if isinstance(meaning, ConversionMember):
            wrong = self._plan_member(meaning, name, tensor)
        else:
            wrong = self._plan_single(meaning, name, tensor)
        if not wrong and self._shares_memory(meaning, tensor):
            wrong = f"{name}: it shares memory with the weights of this model; pass a copy"
        if wrong:
            self._note_problem(wrong, destinations_of(meaning))

    def _shares_memory(self, meaning: Meaning, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of weights, but not at its own destination."""
        if storage_key(held(tensor)) not in self._storages:
            return False
        places = () if isinstance(meaning, ConversionMember) else meaning.places
        return not (places and places[0].is_at(tensor))

    def _find_missing(self) -> None:
        for group, items in self._groups.items():
            absent = [name for name in group.names if name not in items]
            if absent:
                self.missing.extend(absent)
                self._faulty.update(self._keys_of(group.destinations))
                if self._strict:
                    names = ", ".join(name for name, _ in items.values())
                    self._problems.append(f"{names}: needs {some(sorted(absent), _NAMED)} too")
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

    def _raise_problems(self) -> None:
        if not self._problems:
            return
        shown = "".join(f"\n  - {problem}" for problem in self._problems[:_SHOWN])
        hidden = len(self._problems) - _SHOWN
        more = f"\n  - and {hidden} more, in this error's `problems`" if hidden > 0 else ""
        serving = "; the old weights stay in service" if self._live else ""
        error = BaseWeightsError(
            f"{len(self._problems)} problems with the weights{serving}:{shown}{more}"
        )
        error.problems = tuple(self._problems)
        raise error

    def _plan_single(self, place: Destination, name: str, tensor: Tensor) -> str:
        wrong = place.wrong
        if not wrong and place.shape != tuple(tensor.shape):
            shape = tuple(tensor.shape)
            wrong = f"the checkpoint's tensor has shape {shape}, expected {place.shape}"
        wrong = wrong or _dtype_refusal((place,), tensor) or self._fill(place, name, tensor)
        label = name if name == place.path else f"{name} → {place.path}"
        return f"{label}: {wrong}" if wrong else ""

    def _plan_member(self, member: ConversionMember, name: str, tensor: Tensor) -> str:
        group = member.group
        items = self._groups.setdefault(group, {})
        if member.name in items:
            return f"{name}: a duplicate of {items[member.name][0]}"
        items[member.name] = name, tuple(tensor.shape)
        wrong = next((item.wrong for item in group.destinations if item.wrong), "")
        wrong = wrong or _dtype_refusal(group.destinations, tensor)
        if not wrong and is_wrapped(tensor):
            wrong = f"a {type(tensor).__name__} is not converted; give the model's own tensor"
        if not wrong and len(items) == len(group.names):
            wrong = group.misfit({member: shape for member, (_, shape) in items.items()})
            if not wrong:
                faults = [
                    self._fill(item, name, tensor, single=False) for item in group.destinations
                ]
                wrong = next(filter(None, faults), "")
        return f"{name} → {group.path}: {wrong}" if wrong else ""

    def _fill(self, item: Destination, name: str, tensor: Tensor, *, single: bool = True) -> str:
        """Record what a tensor fills. Returns why it cannot, if other tensors fill it already."""
        for place in item.places:
            for target, part in place.fills(tensor.dtype):
                key, expert = self._key(target), _expert(part)
                filled = self._filled.setdefault(key, {})
                comparable = filled if expert is None else (expert, None)
                for earlier in [known for index in comparable for known in filled.get(index, ())]:
                    if not overlapping(earlier.part, part):
                        continue
                    tied = earlier.part == part and earlier.path != item.path
                    if not tied or earlier.numbers is None or not single:
                        return f"a duplicate of {earlier.name}"
                    if not _equal(earlier.numbers, tensor[place.take], target.tensor.dtype):
                        return f"the model ties it to {earlier.name}, and their values differ"
                numbers = None
                several = self._resolver.names.name_counts[key] > 1
                if single and several and not is_wrapped(tensor):
                    numbers = (
                        tensor[place.take] if self._source.stable else tensor[place.take].clone()
                    )
                filled.setdefault(expert, []).append(_Filled(part, name, item.path, numbers))
        return ""

    def _uncovered(self, target: Target) -> str:
        by_expert = self._filled.get(self._key(target))
        if by_expert is None:
            return "nothing in the checkpoint"
        parts = [filled.part for items in by_expert.values() for filled in items]
        pieces = [part for part in parts if isinstance(part, frozenset)]
        if pieces:
            assert isinstance(target.module, LoadableLayer)
            lacking = target.module.pieces(target.attribute) - frozenset().union(*pieces)
            absent = sorted(map(str, lacking))
            return f"nothing in the checkpoint for slices {some(absent, _NAMED)}" if absent else ""
        boxes = {part for part in parts if isinstance(part, tuple)}
        covered, size = sum(prod(map(len, box)) for box in boxes), target.tensor.numel()
        if covered >= size:
            return ""
        experts = range(target.tensor.shape[0] if target.tensor.dim() == 3 else 0)
        absent = [str(e) for e in experts if not any(e in box[0] for box in boxes)]
        which = f", nothing for experts {some(absent, _NAMED)}" if absent else ""
        return f"{covered} of its {size} numbers are in the checkpoint{which}"

    def _note_problem(self, problem: str, destinations: Iterable[Destination]) -> None:
        self._problems.append(problem)
        self._faulty.update(self._keys_of(destinations))

    def _keys_of(self, destinations: Iterable[Destination]) -> Iterator[_Key]:
        return (self._key(place.target) for item in destinations for place in item.places)

    def _key(self, target: Target) -> _Key:
        tensor = target.tensor
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = memory_key(tensor)
        return self._keys[id(tensor)]


def _dtype_refusal(destinations: Iterable[Destination], tensor: Tensor) -> str:
    refusals = (place.refusal(tensor) for item in destinations for place in item.places)
    return next(filter(None, refusals), "")


def _equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(device=a.device, dtype=dtype))


def load_weights(model: nn.Module, weights: Weights, strict: bool = True) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, a mapping, a safetensors file or folder, or a function that
            yields pairs, under any of the names that updates take (docs/base_weights.md). All of it
            is checked before anything is written; an iterable that can be read only once is copied.
        strict: tensors without a place in the model, and targets that got no tensor, are errors
            too.

    Returns the names of parameters and buffers that were loaded, in full or in part; for tied ones
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
    """The result of an update, by name.

    Attributes:
        loaded: parameters and buffers of the model that got numbers; for tied ones all names.
        missing: parameters that got none or only some, and absent tensors of joint conversions.
        ignored: tensors without a place in the model.
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
    session.base = before._replace(broken=_BROKEN)  # noted before it becomes true
    session.counts.writes += bool(filled)
    loading.write()
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    session.store.refresh_magnitudes()
    session.base = before._replace(broken=before.broken if loading.missing else "")
    return WeightUpdate(
        tuple(str(target) for target in filled), tuple(loading.missing), tuple(loading.ignored)
    )
