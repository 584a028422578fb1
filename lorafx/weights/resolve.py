"""What the name of a checkpoint tensor means in a model, every way of naming tried in turn.

    as it stands, or without prefixes and wrappers, or renamed:
        the tensor itself ▸ routed experts ▸ packed projections ▸ a conversion of transformers

Several meanings of one name are told apart by the tensor's shape. A conversion is undone on tensors
without numbers to learn which tensors, of which shapes, it takes:

    moe.gate_proj.weight, moe.up_proj.weight → mlp.experts.gate_up_proj
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lorafx.errors import CheckpointError
from lorafx.model.experts import (
    PROJECTIONS,
    ExpertMeaning,
    ExpertWeight,
    Half,
    expert_weights,
    meaning,
)
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.packed_names import PackedMember, PackedModules, PackedNames
from lorafx.model.saved_names import Walked, nearest_names
from lorafx.registry import lookup
from lorafx.weights.weight_places import (
    Box,
    ConvertedGroup,
    Destination,
    GroupMember,
    LoadableLayer,
    Meaning,
    Shard,
    Target,
    WeightNames,
    WeightShape,
    destination,
    no_place,
)


class Conversions:
    """What transformers' loader would do to a checkpoint of `model`."""

    def __init__(self, model: nn.Module, transforms: Sequence[Any]) -> None:
        self._model = model
        self._converters: list[Any] = []
        self._rearranging: list[Any] = []
        if transforms:
            loading = sys.modules["transformers.core_model_loading"]
            self._converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
            stacking = (loading.MergeModulelist, loading.Concatenate)
            self._rearranging = [
                converter
                for converter in self._converters
                if not all(isinstance(op, stacking) for op in converter.operations)
            ]
        self._groups: dict[tuple[int, str], ConvertedGroup | str] = {}

    @property
    def rearrange(self) -> bool:
        """Whether it does more than concatenate, so that its sources' names are ambiguous."""
        return bool(self._rearranging)

    def member(
        self,
        name: str,
        find: Callable[[str], Destination | None],
        *,
        rearranging: bool = False,
    ) -> GroupMember | Destination | None:
        """The group of a renamed `name`; None where no conversion takes it. `find` gives a tensor's
        place by name; `rearranging`: only conversions of `rearrange`."""
        for converter in self._rearranging if rearranging else self._converters:
            index = id(converter)
            key, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            if (index, key) not in self._groups:
                self._groups[index, key] = self._group(converter, key, find)
            group = self._groups[index, key]
            if isinstance(group, str):
                return no_place(key, group) if group else None
            return GroupMember(group, name) if name in group.names else None
        return None

    def _group(
        self, converter: Any, key: str, find: Callable[[str], Destination | None]
    ) -> ConvertedGroup | str:
        first, *others = converter.target_patterns
        keys = [key, *(key.replace(first, other) for other in others)]
        found = map(find, keys)
        destinations = tuple(item for item in found if item is not None and item.places)
        if len(destinations) != len(keys):
            return ""
        boxes = [place for d in destinations if isinstance(place := d.places[0], Box)]
        if len(boxes) != len(keys):
            return "it is sharded over ranks, which transformers' conversion does not support"
        shapes = {target: box.target.tensor.shape for target, box in zip(keys, boxes, strict=True)}
        try:
            sources = self._undone(converter, shapes)
        except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            return f"transformers' conversion to {key} could not be reversed for checking: {error}"
        return ConvertedGroup(self._model, converter, key, destinations, sources)

    def _undone(
        self, converter: Any, targets: dict[str, torch.Size]
    ) -> dict[str, tuple[str, WeightShape]]:
        """(pattern, shape) by name of the tensors from which `converter` makes these shapes."""
        undoing = deepcopy(converter).reverse_transform()
        key = ""
        for target, shape in targets.items():
            renamed, pattern = undoing.rename_source_key(target)
            key = key or renamed
            undoing.add_tensor(key, target, pattern, torch.empty(shape, device="meta"))
        made = undoing.convert(key, model=self._model, config=self._model.config)
        natural = sys.modules["transformers.core_model_loading"].dot_natural_key
        found = {}
        for name in sorted(made, key=natural):
            value = made[name][0] if isinstance(made[name], list) else made[name]
            pattern = converter.rename_source_key(name)[1]
            if pattern is None:
                raise ValueError(f"reversed, it yields {name}, which the conversion does not take")
            found[name] = (pattern, tuple(value.shape))
        return found


#: How many unknown names get the names nearest to them, which takes a while.
_NEAREST = 10


class Resolver:
    def __init__(self, graph: ModuleGraph, model: nn.Module, packed: PackedModules | None) -> None:
        self.names = WeightNames(graph, model)
        self._experts = ExpertDestinations(self.names)
        self._packed = PackedDestinations(self.names, PackedNames(graph, packed))
        self._conversions = Conversions(model, self.names.transforms)
        self._unwanted = [
            re.compile(pattern)
            for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        self._advised = 0

    def meaning(self, name: str, shape: WeightShape) -> Meaning | None:
        """The first meaning of this name whose shape fits, else the first of all, or None."""
        first: Meaning | None = None
        for found in self._meanings(name):
            if isinstance(found, GroupMember) or (
                not found.wrong and found.shape in (None, tuple(shape))
            ):
                return found
            first = first or found
        return first

    def is_unwanted(self, name: str) -> bool:
        """Whether checkpoints of this model have `name` and the model itself does without."""
        readings = list(self.names.readings(name))
        if any(pattern.search(reading) for pattern in self._unwanted for reading in readings):
            return True
        return any(
            (target := self._own(reading)) is not None and not target.persistent
            for reading in readings
        )

    def advice(self, name: str) -> str:
        if ".lora_" in name:
            return "a factor of an adapter; load_adapter takes those"
        if self._advised >= _NEAREST:
            return "no place in the model"
        self._advised += 1
        known = (str(target) for target in self.names.targets)
        return f"no place in the model{nearest_names(name, known)}"

    def _meanings(self, name: str) -> Iterator[Meaning]:
        readings = list(self.names.readings(name))
        if self._conversions.rearrange:
            # A family's own conversion comes before the usual meaning of a name: Inkling's
            # w13_weight has gate and up interleaved.
            for reading in readings:
                if self._own(reading) is not None:
                    yield from self._by_walking(reading)
            for reading in readings:
                yield from self._converted(self.names.renamed(reading), rearranging=True)
        for reading in readings:
            yield from self._by_walking(reading)
        for reading in readings:
            newer = self.names.renamed(reading)
            if newer != reading:
                yield from self._by_walking(newer)
            yield from self._converted(newer)

    def _converted(self, newer: str, *, rearranging: bool = False) -> Iterator[Meaning]:
        for candidate in self.names.readings(newer):
            found = self._conversions.member(candidate, self._itself, rearranging=rearranging)
            if found is not None:
                yield found

    def _by_walking(self, reading: str) -> Iterator[Meaning]:
        walked = self.names.walk(reading)
        target = self._held(walked)
        if target is not None and target.is_buffer and not target.persistent:
            return
        yield from self._experts.destinations(walked)
        if target is not None:
            yield destination(target, walked.full_path)
        yield from self._packed.destinations(walked)

    def _own(self, reading: str) -> Target | None:
        return self._held(self.names.walk(reading))

    def _held(self, walked: Walked) -> Target | None:
        one = len(walked.remaining) == 1
        return self.names.target(walked.module, walked.remaining[0]) if one else None

    def _itself(self, name: str) -> Destination | None:
        for reading in self.names.readings(name):
            found = self._own(reading)
            if found is not None:
                return destination(found, name)
        return None


_SHARDS: dict[Half, str] = {"gate": "w1", "up": "w3"}


class ExpertDestinations:
    """Where checkpoint tensors of routed experts go; names and halves are those of adapters.

    experts.3.gate_proj.weight    W_up[3, gate rows, :]      w1, w3, w2 the same in Mixtral's words
    experts.gate_proj             W_up[:, gate rows, :]      the gates of all experts
    experts.gate_up_proj          W_up                       w13, w13_weight
    """

    def __init__(self, names: WeightNames) -> None:
        self._names = names
        self._weights: dict[int, tuple[ExpertWeight, ...]] = {}

    def destinations(self, walked: Walked) -> Iterator[Destination]:
        """The place of a name that leads to a module of experts, if it names a projection."""
        names, kind = _named(walked.remaining)
        meant = meaning(self._of(walked.module), names) if self._of(walked.module) else None
        if meant is None or meant.weight is None:
            return
        target = self._target(walked.module, meant.weight, kind)
        if target is None:
            return
        path = walked.full_path
        wrong, experts = meant.wrong, meant.weight.experts
        if meant.expert is not None and meant.expert >= experts:
            wrong = f"there is no expert {meant.expert}: experts are 0 to {experts - 1}"
        if wrong:
            yield no_place(path, wrong)
        elif isinstance(walked.module, LoadableLayer):
            yield _sharded(target, path, meant)
        else:
            yield _box(target, path, kind, meant)

    def _of(self, module: nn.Module) -> tuple[ExpertWeight, ...]:
        if id(module) not in self._weights:
            self._weights[id(module)] = expert_weights(module) or ()
        return self._weights[id(module)]

    def _target(self, module: nn.Module, weight: ExpertWeight, kind: str) -> Target | None:
        if kind == "weight":
            return self._names.target(module, weight.name)
        stem = weight.name.removesuffix("_weight")
        found = (self._names.target(module, f"{stem}{end}") for end in ("_bias", ".bias"))
        return next((target for target in found if target is not None), None)


def _named(rest: Sequence[str]) -> tuple[list[str], str]:
    """A split "3.gate_proj.weight" as names of a projection, and "weight" or "bias"."""
    names = [name for name in rest if name != "base_layer"]
    if len(names) > 1 and names[-1] in ("weight", "bias"):
        return names[:-1], names[-1]
    stem = names[-1].removesuffix("_bias") if names else ""
    if stem in PROJECTIONS and stem != names[-1]:
        return [*names[:-1], stem], "bias"
    return names, "weight"


def _box(target: Target, path: str, kind: str, meant: ExpertMeaning) -> Destination:
    """By the parameter's own name as it is stored; by any other, and `NAME.weight`, (out, in)."""
    weight = meant.weight
    assert weight is not None
    box = Box.whole(target)
    dims = len(box.box)
    out = dims - 1 if kind == "bias" or weight.transposed else dims - 2
    box = box.narrowed(out, _columns(len(box.box[out]), weight, meant.half))
    as_stored = meant.own and not path.endswith(".weight")
    if kind == "weight" and weight.transposed and not as_stored:
        box = box.swapped()
    if meant.expert is None:
        return Destination(path, box.shape, (box,))
    box = box.narrowed(0, range(meant.expert, meant.expert + 1))
    return Destination(path, box.shape[1:], (box,))


def _columns(size: int, weight: ExpertWeight, half: Half) -> range:
    if half == "all" or not weight.halves:
        return range(size)
    if weight.halves == "interleaved":
        return range(half == "up", size, 2)
    return range(size // 2) if half == "gate" else range(size // 2, size)


def _sharded(target: Target, path: str, meant: ExpertMeaning) -> Destination:
    weight, half, expert = meant.weight, meant.half, meant.expert
    assert weight is not None
    kinds = ["w2"] if weight.down else ["w1", "w3"] if half == "all" else [_SHARDS[half]]
    try:
        if expert is None and half == "all":
            whole = Shard(target)
            return Destination(path, whole.shape, (whole,))
        rows, *others = Shard(target, (kinds[0], expert or 0)).shape
        cuts = tuple(
            Shard(target, (kind, e), (*lead, slice(i * rows, (i + 1) * rows)))
            for e, lead in (
                [(expert, ())] if expert is not None else [(e, (e,)) for e in range(weight.experts)]
            )
            for i, kind in enumerate(kinds)
        )
    except CheckpointError as error:
        return no_place(path, str(error))
    shape = (len(kinds) * rows, *others)
    return Destination(path, shape if expert is not None else (weight.experts, *shape), cuts)


class PackedDestinations:
    """Where tensors of packed projections go, as model or user declare them (PackedNames).

    q_proj.weight (Nq, K) → rows 0 … Nq of qkv_proj.weight      the model packs
    qkv_proj.weight (ΣN, K) → q_proj, k_proj, v_proj            the checkpoint packs
    """

    def __init__(self, names: WeightNames, packed: PackedNames) -> None:
        self._names = names
        self._packed = packed

    def destinations(self, walked: Walked) -> Iterator[Destination]:
        """Possible places of a name whose components, all but two, lead to a module."""
        if len(walked.remaining) != 2 or not self._packed.any:
            return
        name, attribute = walked.remaining
        module, path = walked.module, walked.path
        canonical = self._names.graph.path(module)
        for child_name, child in module._modules.items():
            if child is None:
                continue
            members = self._packed.members(join(canonical, child_name))
            if any(member.name == name for member in members):
                found = self._into(child, join(path, child_name), members, name, attribute)
                if found is not None:
                    yield found
        yield from self._apart(module, path, canonical, name, attribute)

    def _into(
        self,
        child: nn.Module,
        path: str,
        members: tuple[PackedMember, ...],
        name: str,
        attribute: str,
    ) -> Destination | None:
        target = self._names.target(child, attribute)
        if target is None:
            return None
        parent = path.rpartition(".")[0]
        member_path = join(parent, f"{name}.{attribute}")
        index = [member.name for member in members].index(name)
        slices = members[index].slices
        sizes = _slice_sizes(child)
        if sizes is None or (slices is None and len(sizes) != len(members)):
            many = "unknown" if sizes is None else str(len(sizes))
            return no_place(
                member_path,
                f"{len(members)} names are declared for {path}, whose class gives {many} slices; "
                "declare which slices each name covers by packed_modules, and their sizes by "
                "lorafx.register(output_sizes=...), or give the packed tensor",
            )
        whole = destination(target, join(path, attribute))
        if not whole.places:
            return replace(whole, path=member_path)
        if isinstance(child, LoadableLayer):
            return destination(target, member_path, _shard_id(members, index))
        dim = _out_dim(child, len(whole.shape or ()))
        (box,) = whole.places
        assert isinstance(box, Box)
        covered = (index,) if slices is None else slices
        starts = (0, *accumulate(sizes))
        if starts[-1] != len(box.box[dim]) or covered[-1] >= len(sizes):
            return no_place(member_path, f"{path} has slices of {list(sizes)}, which do not fit")
        part = box.narrowed(dim, range(starts[covered[0]], starts[covered[-1] + 1]))
        return Destination(member_path, part.shape, (part,))

    def _apart(
        self, module: nn.Module, path: str, canonical: str, name: str, attribute: str
    ) -> Iterator[Destination]:
        found = [
            (membership.index, membership.count, child_name, child)
            for child_name, child in module._modules.items()
            if child is not None
            for membership in self._packed.memberships(join(canonical, child_name))
            if membership.name == name
        ]
        if not found:
            return
        found.sort(key=lambda item: item[0])
        packed = join(path, f"{name}.{attribute}")
        parts = [
            destination(target, join(path, f"{child_name}.{attribute}"))
            for _, _, child_name, child in found
            if (target := self._names.target(child, attribute)) is not None
        ]
        count = found[0][1]
        if len(parts) != count:
            yield no_place(packed, f"it packs {count} tensors, but only {len(parts)} are here")
            return
        wrong = "; ".join(part.wrong for part in parts if part.wrong)
        if wrong:
            yield no_place(packed, wrong)
            return
        shapes = [part.shape or () for part in parts]
        dim = _out_dim(found[0][3], len(shapes[0]))
        ends = list(accumulate(shape[dim] for shape in shapes))
        lead = (slice(None),) * dim
        places = tuple(
            replace(place, take=(*lead, slice(end - shape[dim], end)))
            for part, shape, end in zip(parts, shapes, ends, strict=True)
            for place in part.places
        )
        yield Destination(packed, (*shapes[0][:dim], ends[-1], *shapes[0][dim + 1 :]), places)


def _shard_id(members: Sequence[PackedMember], index: int) -> Any:
    slices = members[index].slices
    return slices if slices is not None else index if len(members) > 1 else None


def _slice_sizes(module: nn.Module) -> tuple[int, ...] | None:
    """Rows of each output slice of a packed module, None where its class does not say."""
    if isinstance(module, LoadableLayer) and module.output_sizes:
        return module.output_sizes
    entry = lookup(module)
    if entry is None or entry.output_sizes is None:
        return None
    return entry.output_sizes(module)


def _out_dim(module: nn.Module, dims: int) -> int:
    entry = lookup(module)
    return dims - 1 if dims and entry is not None and entry.transposed else 0
