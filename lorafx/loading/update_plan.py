"""The plan of an update: what each tensor means, and everything that is wrong with it.

    for each target   boxes that tensors fill, no two of which meet, and which cover it

Names are planned one by one, without looking at numbers. Numbers are compared only where two names
mean tied tensors; they have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import BaseWeightsError, some
from lorafx.loading.groups import GroupMember, TensorGroup
from lorafx.loading.loadable_layer import LoadableLayer
from lorafx.loading.resolve import Meaning, Resolver
from lorafx.loading.sources import Item
from lorafx.loading.weight_places import Landing, Numbers, Target, WeightShape, meet, volume

_SHOWN = 100
_TOLD = 5  # names in a sentence


@dataclass(frozen=True)
class _Filled:
    """One part of a target that a tensor fills.

    Attributes:
        part: a box, or the pieces of a layer that cuts tensors itself.
        name: the checkpoint's.
        path: the name in the model by which it was reached.
        numbers: reads the tensor, where the target is tied.
    """

    part: Any
    name: str
    path: str
    numbers: Callable[[], Tensor] | None

    def meets(self, part: Any) -> bool:
        if isinstance(self.part, frozenset) and isinstance(part, frozenset):
            both = self.part | part
            return None in both or len(both) < len(self.part) + len(part)  # None is the whole
        if isinstance(self.part, frozenset) or isinstance(part, frozenset):
            return True  # a loader of its own, and nobody knows what it writes
        return meet(self.part, part)


@dataclass
class _Ledger:
    """What fills one target, by the first index of a box where that is a single one (an expert),
    so that an expert's box is not compared with those of all others."""

    parts: dict[int | None, list[_Filled]] = field(default_factory=dict)

    @staticmethod
    def _key(part: Any) -> int | None:
        single = isinstance(part, tuple) and len(part) > 1 and len(part[0]) == 1
        return part[0].start if single else None

    def add(self, filled: _Filled) -> None:
        self.parts.setdefault(self._key(filled.part), []).append(filled)

    def meeting(self, part: Any) -> Iterator[_Filled]:
        key = self._key(part)
        keys = [key, None] if key is not None else list(self.parts)
        for known in dict.fromkeys(keys):
            for filled in self.parts.get(known, ()):
                if filled.meets(part):
                    yield filled

    def all(self) -> Iterator[_Filled]:
        for found in self.parts.values():
            yield from found


class UpdatePlan:
    """What the tensors of one update mean.

    Attributes:
        meanings: by the checkpoint's name.
        planned: shape and numbers of each tensor that has a meaning.
        problems: what is wrong, in the order in which it was found.
        ignored: names that the model has no place for and that are no error.
        missing: what got no numbers, once finished.
    """

    def __init__(
        self, resolver: Resolver, *, strict: bool, stable: bool, live: bool = True
    ) -> None:
        """`stable`: tensors stay as they were given and can be read again. `live`: the model has
        weights that serve; persistent buffers may be left out then."""
        self._resolver, self._strict, self._stable, self._live = resolver, strict, stable, live
        self.meanings: dict[str, Meaning] = {}
        self.planned: dict[str, tuple[WeightShape, Numbers]] = {}
        self.problems: list[str] = []
        self.ignored: list[str] = []
        self.missing: list[str] = []
        self._names: set[str] = set()
        self._ledgers: dict[tuple[object, ...], _Ledger] = {}
        self._groups: dict[TensorGroup, dict[str, Item]] = {}
        self._keys: dict[int, tuple[object, ...]] = {}
        self._tied: dict[tuple[object, ...], int] = {}
        self._faulty: set[tuple[object, ...]] = set()
        for target in (*resolver.names.required, *resolver.names.optional):
            key = self._key(target)
            self._tied[key] = self._tied.get(key, 0) + resolver.names.ways(target)

    def take(self, item: Item) -> Meaning | None:
        """What a tensor means; None where it has no place or something is wrong with it."""
        name = item.name
        if name in self._names:
            self._fault(f"{name}: a duplicate", self.meanings.get(name))
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
            return found if self._take_member(found, item) else None
        label = name if name == found.path else f"{name} → {found.path}"
        wrong = found.wrong or _misshapen(found, item.shape) or _unlike(found, item.numbers)
        if wrong:
            self._fault(f"{label}: {wrong}", found)
            return None
        return found if self._fill(found, item, label) else None

    def finish(self, derived: Callable[[Target], bool] = lambda _: False) -> None:
        """What is still missing. `derived` says of a target that it is computed from others.

        Raises:
            BaseWeightsError: for everything that was wrong, in one.
        """
        for group, items in self._groups.items():
            lacking = [name for name in group.names if name not in items]
            if lacking:
                given = ", ".join(item.name for item in items.values())
                text = f"{given}: needs {some(sorted(lacking), _TOLD)} too"
                self.missing.extend(lacking)
                if self._strict:
                    self._fault(text, *group.landings)
                self._faulty.update(self._key(t) for t in _targets(group.landings))
        self._orientations()
        seen: set[tuple[object, ...]] = set(self._faulty)
        for target in self._wanted():
            key = self._key(target)
            if key in seen or derived(target):
                continue
            seen.add(key)
            uncovered = self._uncovered(target)
            if uncovered:
                self.missing.append(target.name)
                if self._strict:
                    self.problems.append(f"{target.name}: {uncovered}")
        self.check()

    def check(self) -> None:
        """Raises BaseWeightsError for everything that was wrong so far."""
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

    def _wanted(self) -> Iterator[Target]:
        """What has to get numbers."""
        yield from self._resolver.names.required
        if not self._live:
            yield from (target for target in self._resolver.names.optional if target.persistent)

    def filled(self) -> list[Target]:
        """The targets that got numbers, wholly or partly; of tied ones all."""
        every = (*self._resolver.names.required, *self._resolver.names.optional)
        return [target for target in every if self._key(target) in self._ledgers]

    def _take_member(self, member: GroupMember, item: Item) -> bool:
        group = member.group
        items = self._groups.setdefault(group, {})
        if member.name in items:
            self._fault(f"{item.name}: a duplicate of {items[member.name].name}", *group.landings)
            return False
        items[member.name] = item
        label = f"{item.name} → {group.path}"
        if any(landing.wrong for landing in group.landings):
            self._fault(f"{label}: {group.landings[0].wrong}", *group.landings)
            return False
        unlike = next((_unlike(found, item.numbers) for found in group.landings), "")
        if unlike:
            self._fault(f"{label}: {unlike}", *group.landings)
            return False
        if len(items) < len(group.names):
            return True
        misfit = group.misfit({name: items[name].shape for name in group.names})
        if misfit:
            self._fault(f"{label}: {misfit}", *group.landings)
            return False
        filled = [self._fill(found, item, label, alone=False) for found in group.landings]
        return all(filled)

    def _fill(self, landing: Landing, item: Item, label: str, *, alone: bool = True) -> bool:
        """Note what a tensor fills; False where it was filled before by other numbers."""
        fills = [
            (target, part, cut.take)
            for cut in landing.cuts
            for target, part in cut.place.fills(item.numbers.dtype)
        ]
        for target, part, take in fills:
            ledger = self._ledgers.setdefault(self._key(target), _Ledger())
            for earlier in ledger.meeting(part):
                tied = earlier.part == part and earlier.path != landing.path
                if not tied or earlier.numbers is None or not alone:
                    self._fault(f"{label}: a duplicate of {earlier.name}", landing)
                    return False
                if not _same(earlier.numbers(), item.read()[take], target.tensor.dtype):
                    self._fault(
                        f"{label}: the model ties it to {earlier.name}, and their values differ",
                        landing,
                    )
                    return False
            tied_too = alone and self._tied.get(self._key(target), 0) > 1
            numbers = self._numbers(item, take) if tied_too else None
            ledger.add(_Filled(part, item.name, landing.path, numbers))
        return True

    def _numbers(self, item: Item, take: tuple[slice | int, ...]) -> Callable[[], Tensor]:
        if self._stable:
            return lambda: item.read()[take]
        kept = item.read()[take].clone()
        return lambda: kept

    def _orientations(self) -> None:
        """A square matrix beside one that came turned may have come turned too."""
        turned: dict[int, str] = {}
        square: list[tuple[int, str, Landing]] = []
        for name, meaning in self.meanings.items():
            if isinstance(meaning, Landing) and meaning.turned is not None:
                module = id(meaning.cuts[0].place.target.module)
                if meaning.square:
                    square.append((module, name, meaning))
                elif meaning.turned:
                    turned[module] = name
        for module, name, meaning in square:
            if module in turned:
                self._fault(
                    f"{name}: it is square, and {turned[module]} came transposed, so it is "
                    "not known whether this one is transposed too; give the experts one by "
                    "one, or as w13_weight and w2_weight (E, out, in)",
                    meaning,
                )

    def _uncovered(self, target: Target) -> str:
        """What of a target got no numbers, "" where nothing."""
        ledger = self._ledgers.get(self._key(target))
        if ledger is None:
            return "nothing in the checkpoint"
        parts = [filled.part for filled in ledger.all()]
        if isinstance(target.module, LoadableLayer) and any(
            isinstance(p, frozenset) for p in parts
        ):
            lacking = target.module.pieces(target.attribute) - frozenset().union(*parts)
            told = some(sorted(map(str, lacking)), _TOLD)
            return f"nothing in the checkpoint for slices {told}" if lacking else ""
        if any(isinstance(part, frozenset) for part in parts):
            # A loader of its own, of which nobody knows more than what is declared.
            shards = self._resolver.shards(target)
            pieces = frozenset().union(*parts)
            absent = [name for shard, name in shards.items() if not pieces & {None, shard}]
            return f"nothing in the checkpoint for {some(sorted(absent), _TOLD)}" if absent else ""
        whole = target.tensor.numel()
        got = sum(volume(part) for part in {_box_key(part): part for part in parts}.values())
        if got >= whole:
            return ""
        first = target.tensor.shape[0]
        experts = [
            str(i)
            for i in range(first if target.tensor.dim() == 3 else 0)
            if not any(i in part[0] for part in parts)
        ]
        which = f", nothing for experts {some(experts, _TOLD)}" if experts else ""
        return f"{got} of its {whole} numbers are in the checkpoint{which}"

    def _fault(self, problem: str, *found: Meaning | None) -> None:
        self.problems.append(problem)
        landings: list[Landing] = []
        for meaning in found:
            if isinstance(meaning, GroupMember):
                landings.extend(meaning.group.landings)
            elif meaning is not None:
                landings.append(meaning)
        # What they lack is said already.
        self._faulty.update(self._key(target) for target in _targets(landings))

    def _key(self, target: Target) -> tuple[object, ...]:
        tensor = target.tensor
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = target.key
        return self._keys[id(tensor)]


def _targets(landings: Any) -> Iterator[Target]:
    return (cut.place.target for landing in landings for cut in landing.cuts)


def _box_key(part: tuple[range, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple((r.start, r.stop, r.step) for r in part)


def _misshapen(found: Landing, shape: WeightShape) -> str:
    if found.shape is None or found.shape == tuple(shape):
        return ""
    return f"the checkpoint's tensor has shape {tuple(shape)}, expected {found.shape}"


def _unlike(found: Landing, numbers: Numbers) -> str:
    return next((r for cut in found.cuts if (r := cut.place.refusal(numbers))), "")


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(device=a.device, dtype=dtype))
