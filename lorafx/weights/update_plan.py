"""The plan of an update: what each tensor means, and everything that is wrong with it.

    for each target   boxes that tensors fill, no two of which meet, and which cover it

Numbers are compared only where two names mean tied tensors; they have to be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import BaseWeightsError, some
from lorafx.weights.groups import GroupMember, Meaning, TensorGroup, destinations_of
from lorafx.weights.loadable_layer import LoadableLayer
from lorafx.weights.resolve import Resolver
from lorafx.weights.sources import Item
from lorafx.weights.weight_places import Destination, Numbers, Target, WeightShape, meet

_SHOWN = 100  # problems in a message
_NAMED = 5  # names in a sentence

_Key = tuple[object, ...]


@dataclass(frozen=True)
class _Filled:
    """A part of a target (a box, or pieces of a layer) that the checkpoint's `name` fills; `path`
    is its name in the model, `numbers` reads the tensor, where the target is tied."""

    part: Any
    name: str
    path: str
    numbers: Callable[[], Tensor] | None

    def meets(self, part: Any) -> bool:
        if isinstance(self.part, frozenset) and isinstance(part, frozenset):
            union = self.part | part
            return None in union or len(union) < len(self.part) + len(part)  # None is the whole
        if isinstance(self.part, frozenset) or isinstance(part, frozenset):
            return True  # a loader of its own, and nobody knows what it writes
        return meet(self.part, part)


def _expert(part: Any) -> int | None:
    single = isinstance(part, tuple) and len(part) > 1 and len(part[0]) == 1
    return part[0].start if single else None


class UpdatePlan:
    """What the tensors of one update mean (`meanings`, by the checkpoint's name), what is wrong
    (`problems`), what has no place and is no error (`ignored`), and, once finished, `missing`."""

    def __init__(
        self, resolver: Resolver, *, strict: bool, stable: bool, live: bool = True
    ) -> None:
        """`stable`: tensors stay as they were given and can be read again. `live`: the model has
        weights that serve; persistent buffers may be left out then."""
        self._resolver, self._strict, self._stable, self._live = resolver, strict, stable, live
        self.targets = resolver.names.targets
        self.meanings: dict[str, Meaning] = {}
        self.planned: dict[str, tuple[WeightShape, Numbers]] = {}
        self.problems: list[str] = []
        self.ignored: list[str] = []
        self.missing: list[str] = []
        self._names: set[str] = set()
        #: By target and expert: an expert's box is not compared with those of all others.
        self._filled: dict[_Key, dict[int | None, list[_Filled]]] = {}
        self._groups: dict[TensorGroup, dict[str, Item]] = {}
        self._keys: dict[int, _Key] = {}
        self._ways: Counter[_Key] = Counter()
        self._faulty: set[_Key] = set()
        for target in self.targets:
            self._ways[self._key(target)] += resolver.names.ways(target)

    def take(self, item: Item) -> Meaning | None:
        """The meaning of a tensor; None where it has no place or something is wrong with it."""
        name = item.name
        if name in self._names:
            self._fault(f"{name}: a duplicate", destinations_of(self.meanings.get(name)))
            return None
        self._names.add(name)
        found = self._resolver.meaning(name, item.shape)
        if found is None:
            if not self._strict or self._resolver.is_unwanted(name):
                self.ignored.append(name)
            else:
                self.problems.append(f"{name}: {self._resolver.advice(name)}")
            return None
        self.meanings[name] = found
        self.planned[name] = item.shape, item.numbers
        if isinstance(found, GroupMember):
            wrong = self._take_member(found, item)
        else:
            wrong = self._take_alone(found, item)
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
                    given = ", ".join(item.name for item in items.values())
                    self.problems.append(f"{given}: needs {some(sorted(lacking), _NAMED)} too")
        self._orientations()
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

    def _take_alone(self, found: Destination, item: Item) -> str:
        wrong = found.wrong
        if not wrong and found.shape not in (None, tuple(item.shape)):
            wrong = f"the checkpoint's tensor has shape {tuple(item.shape)}, expected {found.shape}"
        wrong = wrong or _unlike((found,), item.numbers) or self._fill(found, item)
        label = item.name if item.name == found.path else f"{item.name} → {found.path}"
        return f"{label}: {wrong}" if wrong else ""

    def _take_member(self, member: GroupMember, item: Item) -> str:
        group = member.group
        items = self._groups.setdefault(group, {})
        if member.name in items:
            return f"{item.name}: a duplicate of {items[member.name].name}"
        items[member.name] = item
        wrong = next((found.wrong for found in group.destinations if found.wrong), "")
        wrong = wrong or _unlike(group.destinations, item.numbers)
        if not wrong and len(items) == len(group.names):
            wrong = group.misfit({name: items[name].shape for name in group.names})
            if not wrong:
                filled = [self._fill(found, item, alone=False) for found in group.destinations]
                wrong = next(filter(None, filled), "")
        return f"{item.name} → {group.path}: {wrong}" if wrong else ""

    def _fill(self, found: Destination, item: Item, *, alone: bool = True) -> str:
        """Note what a tensor fills; returns why not, where other numbers fill it already."""
        fills = [
            (target, part, cut.take)
            for cut in found.cuts
            for target, part in cut.place.fills(item.numbers.dtype)
        ]
        for target, part, take in fills:
            key, expert = self._key(target), _expert(part)
            filled = self._filled.setdefault(key, {})
            near = filled if expert is None else (expert, None)
            for earlier in [known for index in near for known in filled.get(index, ())]:
                if not earlier.meets(part):
                    continue
                tied = earlier.part == part and earlier.path != found.path
                if not tied or earlier.numbers is None or not alone:
                    return f"a duplicate of {earlier.name}"
                if not _same(earlier.numbers(), item.read()[take], target.tensor.dtype):
                    return f"the model ties it to {earlier.name}, and their values differ"
            numbers = self._numbers(item, take) if alone and self._ways[key] > 1 else None
            filled.setdefault(expert, []).append(_Filled(part, item.name, found.path, numbers))
        return ""

    def _numbers(self, item: Item, take: tuple[slice | int, ...]) -> Callable[[], Tensor]:
        if self._stable:
            return lambda: item.read()[take]
        kept = item.read()[take].clone()
        return lambda: kept

    def _orientations(self) -> None:
        """Refuse a square matrix beside a transposed matrix: it may be transposed too."""
        turned: dict[int, str] = {}
        square: list[tuple[int, str, Destination]] = []
        for name, meaning in self.meanings.items():
            if isinstance(meaning, Destination) and meaning.turned is not None:
                module = id(meaning.cuts[0].place.target.module)
                if meaning.square:
                    square.append((module, name, meaning))
                elif meaning.turned:
                    turned[module] = name
        for module, name, meaning in square:
            if module in turned:
                wrong = (
                    f"{name}: it is square, and {turned[module]} came transposed, so it is "
                    "not known whether this one is transposed too; give the experts one by "
                    "one, or as w13_weight and w2_weight (E, out, in)"
                )
                self._fault(wrong, (meaning,))

    def _uncovered(self, target: Target) -> str:
        by_expert = self._filled.get(self._key(target))
        if by_expert is None:
            return "nothing in the checkpoint"
        parts = [filled.part for found in by_expert.values() for filled in found]
        pieces = [part for part in parts if isinstance(part, frozenset)]
        if pieces:
            return self._lacking_pieces(target, frozenset().union(*pieces))
        boxes = set(parts)
        got, whole = sum(prod(map(len, box)) for box in boxes), target.tensor.numel()
        if got >= whole:
            return ""
        experts = range(target.tensor.shape[0] if target.tensor.dim() == 3 else 0)
        absent = [str(e) for e in experts if not any(e in box[0] for box in boxes)]
        which = f", nothing for experts {some(absent, _NAMED)}" if absent else ""
        return f"{got} of its {whole} numbers are in the checkpoint{which}"

    def _lacking_pieces(self, target: Target, pieces: frozenset[Any]) -> str:
        if isinstance(target.module, LoadableLayer):
            absent = sorted(map(str, target.module.pieces(target.attribute) - pieces))
            what = f"slices {some(absent, _NAMED)}"
        else:  # a loader of its own, of which nobody knows more than what is declared
            shards = self._resolver.shards(target)
            absent = sorted(name for shard, name in shards.items() if not pieces & {None, shard})
            what = some(absent, _NAMED)
        return f"nothing in the checkpoint for {what}" if absent else ""

    def _fault(self, problem: str, found: Iterable[Destination]) -> None:
        self.problems.append(problem)
        self._faulty.update(self._keys_of(found))

    def _keys_of(self, found: Iterable[Destination]) -> Iterator[_Key]:
        return (self._key(cut.place.target) for item in found for cut in item.cuts)

    def _key(self, target: Target) -> _Key:
        tensor = target.tensor
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = target.key
        return self._keys[id(tensor)]


def _unlike(found: Iterable[Destination], numbers: Numbers) -> str:
    refusals = (cut.place.refusal(numbers) for item in found for cut in item.cuts)
    return next(filter(None, refusals), "")


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(device=a.device, dtype=dtype))
