"""The plan of an update: what each tensor means, and everything that is wrong with it.

    for each target   boxes that tensors fill, no two of which meet, and which cover it

Numbers are compared only where two names mean tied tensors; they have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.errors import BaseWeightsError, some
from lorafx.weights.loadable_layer import LoadableLayer
from lorafx.weights.resolve import Resolver
from lorafx.weights.weight_places import (
    Destination,
    GroupMember,
    Meaning,
    Part,
    Target,
    TensorGroup,
    WeightShape,
    destinations_of,
    meet,
)

_SHOWN = 100  # problems in a message
_NAMED = 5  # names in a sentence

_Key = tuple[object, ...]


class _Filled(NamedTuple):
    """A part of a target that the checkpoint's `name` fills; `path` is its name in the model,
    `numbers` are the tensor's where the target is tied."""

    part: Part
    name: str
    path: str
    numbers: Tensor | None


def _expert(part: Part) -> int | None:
    if isinstance(part, frozenset) or len(part) < 2 or len(part[0]) != 1:
        return None
    return part[0].start


class UpdatePlan:
    """What the tensors of one update mean (`meanings`, by the checkpoint's name), what is wrong
    (`problems`), what has no place and is no error (`ignored`), and, once finished, `missing`."""

    def __init__(
        self, resolver: Resolver, *, strict: bool, stable: bool, live: bool = True
    ) -> None:
        """`stable`: tensors stay as they were given. `live`: the model has weights that serve;
        persistent buffers may be left out then."""
        self._resolver, self._strict, self._stable, self._live = resolver, strict, stable, live
        self.targets = resolver.names.targets
        self.meanings: dict[str, Meaning] = {}
        self.planned: dict[str, tuple[WeightShape, torch.dtype]] = {}
        self.problems: list[str] = []
        self.ignored: list[str] = []
        self.missing: list[str] = []
        self._names: set[str] = set()
        #: By target and expert: an expert's box is not compared with those of all others.
        self._filled: dict[_Key, dict[int | None, list[_Filled]]] = {}
        #: By group and its name for a tensor: the checkpoint's name, and the shape.
        self._groups: dict[TensorGroup, dict[str, tuple[str, WeightShape]]] = {}
        self._keys: dict[int, _Key] = {}
        self._faulty: set[_Key] = set()

    def take(self, name: str, tensor: Tensor) -> Meaning | None:
        """The meaning of a tensor; None where it has no place or something is wrong with it."""
        if name in self._names:
            self._fault(f"{name}: a duplicate", destinations_of(self.meanings.get(name)))
            return None
        self._names.add(name)
        shape = tuple(tensor.shape)
        found = self._resolver.meaning(name, shape)
        if found is None:
            if not self._strict or self._resolver.is_unwanted(name):
                self.ignored.append(name)
            else:
                self.problems.append(f"{name}: {self._resolver.advice(name)}")
            return None
        self.meanings[name] = found
        self.planned[name] = shape, tensor.dtype
        if isinstance(found, GroupMember):
            wrong = self._take_member(found, name, tensor)
        else:
            wrong = self._take_alone(found, name, tensor)
        if wrong:
            self._fault(wrong, destinations_of(found))
        return None if wrong else found

    def finish(self, derived: Callable[[Target], bool] = lambda _: False) -> None:
        """Find what is missing; BaseWeightsError for everything wrong."""
        for group, items in self._groups.items():
            lacking = [name for name in group.names if name not in items]
            if lacking:
                self.missing.extend(lacking)
                self._faulty.update(self._keys_of(group.destinations))
                if self._strict:
                    given = ", ".join(name for name, _ in items.values())
                    self.problems.append(f"{given}: needs {some(sorted(lacking), _NAMED)} too")
        seen = set(self._faulty)
        for target in self.targets:
            key = self._key(target)
            needed = not target.is_buffer or (not self._live and target.persistent)
            if not needed or key in seen or derived(target):
                continue
            seen.add(key)
            uncovered = self._uncovered(target)
            if uncovered:
                self.missing.append(target.name)
                if self._strict:
                    self.problems.append(f"{target.name}: {uncovered}")
        self._raise()

    def _raise(self) -> None:
        if not self.problems:
            return
        shown = "".join(f"\n  - {problem}" for problem in self.problems[:_SHOWN])
        rest = len(self.problems) - _SHOWN
        more = f"\n  - and {rest} more, in this error's `problems`" if rest > 0 else ""
        serving = "; the old weights stay in service" if self._live else ""
        error = BaseWeightsError(
            f"{len(self.problems)} problems with the weights{serving}:{shown}{more}"
        )
        error.problems = tuple(self.problems)
        raise error

    def filled(self) -> list[Target]:
        """The targets that got numbers, wholly or partly; of tied ones all."""
        return [target for target in self.targets if self._key(target) in self._filled]

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
                    numbers = tensor[place.take] if self._stable else tensor[place.take].clone()
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
        self.problems.append(problem)
        self._faulty.update(self._keys_of(found))

    def _keys_of(self, found: Iterable[Destination]) -> Iterator[_Key]:
        return (self._key(place.target) for item in found for place in item.places)

    def _key(self, target: Target) -> _Key:
        tensor = target.tensor
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = target.key
        return self._keys[id(tensor)]


def _unlike(found: Iterable[Destination], tensor: Tensor) -> str:
    refusals = (place.refusal(tensor) for item in found for place in item.places)
    return next(filter(None, refusals), "")


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(device=a.device, dtype=dtype))
