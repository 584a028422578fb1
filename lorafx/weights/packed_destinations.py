"""Where checkpoint tensors of packed projections go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

from torch import nn

from lorafx.model.module_graph import join
from lorafx.model.packed_names import PackedMember, PackedNames
from lorafx.model.saved_names import Walked
from lorafx.registry import lookup
from lorafx.weights.loadable_layers import LoadableLayer
from lorafx.weights.targets import WeightNames
from lorafx.weights.weight_places import Box, Destination, destination, no_place


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
