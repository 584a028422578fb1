"""Finds the meaning of a checkpoint tensor's name in a model.

    unchanged, or without prefixes and wrappers, or renamed, it is tried as
        a tensor's name ▸ one of routed experts ▸ of packed projections ▸ of a conversion

If a name has several meanings, the tensor's shape decides. A conversion of transformers is reversed
on meta tensors to find out which tensors it takes, with their shapes:

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
    """The conversions that transformers' loader would apply to a checkpoint of `model`."""

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
        """Whether some do more than concatenate, so that the names of inputs are ambiguous."""
        return bool(self._rearranging)

    def member(
        self, name: str, find: Callable[[str], Destination | None], *, rearranging: bool = False
    ) -> GroupMember | Destination | None:
        """The group of a renamed `name`; None if no conversion takes it. `find` returns a tensor's
        place by its name. `rearranging`: only conversions that do more than concatenate."""
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
        first, *more = converter.target_patterns
        keys = [key, *(key.replace(first, pattern) for pattern in more)]
        candidates = map(find, keys)
        destinations = tuple(item for item in candidates if item is not None and item.places)
        if len(destinations) != len(keys):
            return ""
        boxes = [place for d in destinations if isinstance(place := d.places[0], Box)]
        if len(boxes) != len(keys):
            return "it is sharded over ranks, which transformers' conversion does not support"
        shapes = {target: box.target.tensor.shape for target, box in zip(keys, boxes, strict=True)}
        try:
            sources = self._inputs_of(converter, shapes)
        except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            return f"transformers' conversion to {key} could not be reversed for checking: {error}"
        return ConvertedGroup(self._model, converter, key, destinations, sources)

    def _inputs_of(
        self, converter: Any, targets: dict[str, torch.Size]
    ) -> dict[str, tuple[str, WeightShape]]:
        """(pattern, shape), by name, of the tensors from which `converter` makes these shapes."""
        inverse = deepcopy(converter).reverse_transform()
        key = ""
        for target, shape in targets.items():
            renamed, pattern = inverse.rename_source_key(target)
            key = key or renamed
            inverse.add_tensor(key, target, pattern, torch.empty(shape, device="meta"))
        inputs = inverse.convert(key, model=self._model, config=self._model.config)
        natural_key = sys.modules["transformers.core_model_loading"].dot_natural_key
        sources = {}
        for name in sorted(inputs, key=natural_key):
            value = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
            pattern = converter.rename_source_key(name)[1]
            if pattern is None:
                raise ValueError(f"reversed, it yields {name}, which the conversion does not take")
            sources[name] = (pattern, tuple(value.shape))
        return sources


#: For how many unknown names a message has the nearest names, which take long to find.
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
        """The first meaning of this name with a fitting shape, else the first, or None."""
        first: Meaning | None = None
        for item in self._meanings(name):
            if isinstance(item, GroupMember):
                return item
            if not item.wrong and item.shape in (None, tuple(shape)):
                return item
            first = first or item
        return first

    def is_unwanted(self, name: str) -> bool:
        """Whether checkpoints of this model may have `name` although the model does not."""
        readings = list(self.names.readings(name))
        if any(pattern.search(reading) for pattern in self._unwanted for reading in readings):
            return True
        return any(
            (target := self._tensor_at(reading)) is not None and not target.persistent
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
            # A family's conversion has precedence over the usual meaning of a name: Inkling's
            # w13_weight has gate and up interleaved.
            for reading in readings:
                if self._tensor_at(reading) is not None:
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
        for name in self.names.readings(newer):
            item = self._conversions.member(name, self._tensor_place, rearranging=rearranging)
            if item is not None:
                yield item

    def _by_walking(self, reading: str) -> Iterator[Meaning]:
        walked = self.names.walk(reading)
        target = self._walked_tensor(walked)
        if target is not None and target.is_buffer and not target.persistent:
            return
        yield from self._experts.destinations(walked)
        if target is not None:
            yield destination(target, walked.full_path)
        yield from self._packed.destinations(walked)

    def _tensor_at(self, reading: str) -> Target | None:
        return self._walked_tensor(self.names.walk(reading))

    def _walked_tensor(self, walked: Walked) -> Target | None:
        complete = len(walked.remaining) == 1
        return self.names.target(walked.module, walked.remaining[0]) if complete else None

    def _tensor_place(self, name: str) -> Destination | None:
        for reading in self.names.readings(name):
            target = self._tensor_at(reading)
            if target is not None:
                return destination(target, name)
        return None


_SHARDS: dict[Half, str] = {"gate": "w1", "up": "w3"}


class ExpertDestinations:
    """Where checkpoint tensors of routed experts go; names and halves are those of adapters.

    experts.3.gate_proj.weight    W_up[3, gate rows, :]      w1, w3, w2 the same in Mixtral's names
    experts.gate_proj             W_up[:, gate rows, :]      the gates of all experts
    experts.gate_up_proj          W_up                       w13, w13_weight
    """

    def __init__(self, names: WeightNames) -> None:
        self._names = names
        self._weights: dict[int, tuple[ExpertWeight, ...]] = {}

    def destinations(self, walked: Walked) -> Iterator[Destination]:
        """The place of a name below a module of experts, if it is that of a projection."""
        names, kind = _split_kind(walked.remaining)
        weights = self._weights_of(walked.module)
        meant = meaning(weights, names) if weights else None
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

    def _weights_of(self, module: nn.Module) -> tuple[ExpertWeight, ...]:
        if id(module) not in self._weights:
            self._weights[id(module)] = expert_weights(module, whole=True) or ()
        return self._weights[id(module)]

    def _target(self, module: nn.Module, weight: ExpertWeight, kind: str) -> Target | None:
        if kind == "weight":
            return self._names.target(module, weight.name)
        stem = weight.name.removesuffix("_weight")
        candidates = (self._names.target(module, f"{stem}{end}") for end in ("_bias", ".bias"))
        return next((target for target in candidates if target is not None), None)


def _split_kind(remaining: Sequence[str]) -> tuple[list[str], str]:
    """The names of a projection in a split "3.gate_proj.weight", and "weight" or "bias"."""
    names = [name for name in remaining if name != "base_layer"]
    if len(names) > 1 and names[-1] in ("weight", "bias"):
        return names[:-1], names[-1]
    stem = names[-1].removesuffix("_bias") if names else ""
    if stem in PROJECTIONS and stem != names[-1]:
        return [*names[:-1], stem], "bias"
    return names, "weight"


def _box(target: Target, path: str, kind: str, meant: ExpertMeaning) -> Destination:
    """In the parameter's layout under its own name; (out, in) under others and as `NAME.weight`."""
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
            shard = Shard(target)
            return Destination(path, shard.shape, (shard,))
        rows, *trailing = Shard(target, (kinds[0], expert or 0)).shape
        cuts = tuple(
            Shard(target, (kind, e), (*lead, slice(i * rows, (i + 1) * rows)))
            for e, lead in (
                [(expert, ())] if expert is not None else [(e, (e,)) for e in range(weight.experts)]
            )
            for i, kind in enumerate(kinds)
        )
    except CheckpointError as error:
        return no_place(path, str(error))
    shape = (len(kinds) * rows, *trailing)
    return Destination(path, shape if expert is not None else (weight.experts, *shape), cuts)


class PackedDestinations:
    """Where tensors of packed projections go, by the declarations of model and user (PackedNames).

    q_proj.weight (Nq, K) → rows 0 … Nq of qkv_proj.weight      the model packs
    qkv_proj.weight (ΣN, K) → q_proj, k_proj, v_proj            the checkpoint packs
    """

    def __init__(self, names: WeightNames, packed: PackedNames) -> None:
        self._names = names
        self._packed = packed

    def destinations(self, walked: Walked) -> Iterator[Destination]:
        """Possible places of a name of which all but the last two components lead to a module."""
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
                part = self._into_packed(child, join(path, child_name), members, name, attribute)
                if part is not None:
                    yield part
        yield from self._into_members(module, path, canonical, name, attribute)

    def _into_packed(
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
            count = "unknown" if sizes is None else str(len(sizes))
            return no_place(
                member_path,
                f"{len(members)} names are declared for {path}, whose class gives {count} slices; "
                "declare which slices each name covers by packed_modules, and their sizes by "
                "lorafx.register(output_sizes=...), or give the packed tensor",
            )
        packed = destination(target, join(path, attribute))
        if not packed.places:
            return replace(packed, path=member_path)
        if isinstance(child, LoadableLayer):
            shard_id = slices if slices is not None else index if len(members) > 1 else None
            return destination(target, member_path, shard_id)
        dim = _out_dim(child, len(packed.shape or ()))
        (box,) = packed.places
        assert isinstance(box, Box)
        covered = (index,) if slices is None else slices
        starts = (0, *accumulate(sizes))
        if starts[-1] != len(box.box[dim]) or covered[-1] >= len(sizes):
            return no_place(member_path, f"{path} has slices of {list(sizes)}, which do not fit")
        part = box.narrowed(dim, range(starts[covered[0]], starts[covered[-1] + 1]))
        return Destination(member_path, part.shape, (part,))

    def _into_members(
        self, module: nn.Module, path: str, canonical: str, name: str, attribute: str
    ) -> Iterator[Destination]:
        members = [
            (membership.index, membership.count, child_name, child)
            for child_name, child in module._modules.items()
            if child is not None
            for membership in self._packed.memberships(join(canonical, child_name))
            if membership.name == name
        ]
        if not members:
            return
        members.sort(key=lambda item: item[0])
        packed_path = join(path, f"{name}.{attribute}")
        parts = [
            destination(target, join(path, f"{child_name}.{attribute}"))
            for _, _, child_name, child in members
            if (target := self._names.target(child, attribute)) is not None
        ]
        count = members[0][1]
        if len(parts) != count:
            yield no_place(packed_path, f"it packs {count} tensors, but only {len(parts)} are here")
            return
        wrong = "; ".join(part.wrong for part in parts if part.wrong)
        if wrong:
            yield no_place(packed_path, wrong)
            return
        shapes = [part.shape or () for part in parts]
        dim = _out_dim(members[0][3], len(shapes[0]))
        ends = list(accumulate(shape[dim] for shape in shapes))
        lead = (slice(None),) * dim
        places = tuple(
            replace(place, take=(*lead, slice(end - shape[dim], end)))
            for part, shape, end in zip(parts, shapes, ends, strict=True)
            for place in part.places
        )
        yield Destination(packed_path, (*shapes[0][:dim], ends[-1], *shapes[0][dim + 1 :]), places)


def _slice_sizes(module: nn.Module) -> tuple[int, ...] | None:
    """The rows of each output slice of a packed module; None if its class does not give them."""
    if isinstance(module, LoadableLayer) and module.output_sizes:
        return module.output_sizes
    entry = lookup(module)
    if entry is None or entry.output_sizes is None:
        return None
    return entry.output_sizes(module)


def _out_dim(module: nn.Module, dims: int) -> int:
    entry = lookup(module)
    return dims - 1 if dims and entry is not None and entry.transposed else 0
