"""Packed projections by name: which names a packed module packs, and which pack a module.

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"],
                              "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": 3}}

Model authors declare it on the model or on any module above the layer, users by
`LoraConfig(packed_modules=...)`. A list has a name for each output slice, in order; a mapping has
the slices of each name. An adapter may name `q_proj` on a model that has `qkv_proj`, and `qkv_proj`
on one that has its members. The configuration's declaration has precedence, then the declaration
nearest above a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from lorafx.errors import ConfigError
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.sites import Membership, Part

ATTRIBUTE = "packed_modules_mapping"

#: What users write: a name for each slice, or the slices of each name.
PackedModules = Mapping[str, Sequence[str] | Mapping[str, int | Sequence[int]]]


@dataclass(frozen=True)
class PackedMember:
    """One name of a packed module, and its slices where they were declared."""

    name: str
    slices: tuple[int, ...] | None = None


Members = Mapping[str, tuple[PackedMember, ...]]


def members_of(packed: PackedModules | None, where: str) -> dict[str, tuple[PackedMember, ...]]:
    """A checked declaration; ConfigError for another type, repeated names, overlapping slices."""
    if packed is None:
        return {}
    if not isinstance(packed, Mapping):
        raise ConfigError(f"{where} must map packed names to member names, got {packed!r}")
    return {name: _members(name, value, where) for name, value in packed.items()}


def _members(name: str, value: object, where: str) -> tuple[PackedMember, ...]:
    if isinstance(value, Mapping):
        members = [PackedMember(member, _slices(slices)) for member, slices in value.items()]
        members.sort(key=lambda member: member.slices or (-1,))
        covered = [i for member in members for i in member.slices or ()]
        if len(set(covered)) != len(covered) or any(
            not member.slices
            or member.slices != tuple(range(member.slices[0], member.slices[-1] + 1))
            for member in members
        ):
            raise ConfigError(
                f"{where}[{name!r}]: every member needs consecutive slices of its own, got "
                f"{value!r}"
            )
    elif isinstance(value, Sequence) and not isinstance(value, str):
        members = [PackedMember(member) for member in value]
    else:
        raise ConfigError(
            f"{where}[{name!r}] must be a list of names, or a mapping from names to slices, "
            f"got {value!r}"
        )
    names = [member.name for member in members]
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{where}[{name!r}] needs distinct names, got {value!r}")
    return tuple(members)


def _slices(value: object) -> tuple[int, ...] | None:
    if isinstance(value, int):
        return (value,)
    if isinstance(value, Sequence) and all(isinstance(i, int) and i >= 0 for i in value):
        return tuple(value)
    return None


def renamed(path: str, name: str) -> str:
    return join(path.rpartition(".")[0], name)


class PackedNames:
    def __init__(self, graph: ModuleGraph, configured: PackedModules | None = None) -> None:
        self._configured = members_of(configured, "LoraConfig.packed_modules")
        self._declared: dict[str, Members] = {}
        for path, module in graph.modules():
            declared = getattr(module, ATTRIBUTE, None)
            if declared:
                where = f"{type(module).__qualname__}.{ATTRIBUTE}"
                self._declared[path] = members_of(declared, where)
        self._by_parent: dict[str, Members] = {}
        self._graph = graph

    @property
    def any(self) -> bool:
        return bool(self._configured or self._declared)

    def members(self, path: str) -> tuple[PackedMember, ...]:
        if not self.any:
            return ()
        parent, _, name = path.rpartition(".")
        members = self._below(parent).get(name, ())
        # A member that is a module of this model is not packed in it, even if a mapping for all
        # models of a family says so.
        exists = any(self._graph.find(join(parent, m.name)) is not None for m in members)
        return () if exists else members

    def memberships(self, path: str) -> tuple[Membership, ...]:
        """The packed names, without a module of their own here, that pack the module at `path`."""
        if not self.any:
            return ()
        parent, _, name = path.rpartition(".")
        return tuple(
            Membership(packed, index, len(members))
            for packed, members in self._below(parent).items()
            for index, member in enumerate(members)
            if member.name == name and self._graph.find(join(parent, packed)) is None
        )

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self._graph.modules():
            names = [member.name for member in self.members(path)]
            names += [packed.name for packed in self.memberships(path)]
            yield from ((renamed(path, name), module) for name in names)

    def unused(self) -> list[str]:
        """Names of the configuration's declaration that name no module, packed or not."""
        last_names = {path.rpartition(".")[2] for path, _ in self._graph.modules()}
        return [
            packed
            for packed, members in self._configured.items()
            if last_names.isdisjoint([packed, *(member.name for member in members)])
        ]

    def _below(self, parent: str) -> Members:
        """The declarations that hold for the children of `parent`."""
        if parent not in self._by_parent:
            declared = self._declared.get(parent, {})
            inherited = self._below(parent.rpartition(".")[0]) if parent else {}
            self._by_parent[parent] = {**inherited, **declared, **self._configured}
        return self._by_parent[parent]


def parts_of(
    where: str,
    members: Sequence[PackedMember],
    sizes: Sequence[int] | None,
    in_features: int,
    total: int,
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts of a site, and the names that only the rows of an adapter's B can place.

    There is a part for each member and for each slice of no member. If there are fewer names than
    slices, there is one for each slice, and the names are returned; if the class does not give the
    `sizes` of slices, there is one. ValueError if names and slices do not fit."""
    whole = (Part("", (0,) if sizes is None else tuple(range(len(sizes))), in_features, total),)
    if sizes is not None and (sum(sizes) != total or not all(size > 0 for size in sizes)):
        raise ValueError(
            f"{where} has output slices of {list(sizes)}, which do not add up to {total}"
        )
    if not members or sizes is None:
        return whole, ()
    named: dict[int, PackedMember] = {}
    if all(member.slices is not None for member in members):
        named = {i: member for member in members for i in member.slices or ()}
        if max(named) >= len(sizes):
            raise ValueError(
                f"{where} has {len(sizes)} output slices, and {named[max(named)].name} is declared "
                f"to be slice {max(named)}"
            )
    elif len(members) == len(sizes):
        named = dict(enumerate(members))
    elif len(members) > len(sizes):
        raise ValueError(
            f"{where} has {len(sizes)} output slices for the {len(members)} names "
            f"{', '.join(member.name for member in members)}; declare with packed_modules which "
            "slices each name covers"
        )
    parts: list[Part] = []
    start = 0
    while start < len(sizes):
        member = named.get(start)
        slices = (start,) if member is None or member.slices is None else member.slices
        width = sum(sizes[i] for i in slices)
        parts.append(Part("" if member is None else member.name, slices, in_features, width))
        start = slices[-1] + 1
    return tuple(parts), () if named else tuple(member.name for member in members)


def virtual_paths(paths: Iterable[str], name: str) -> tuple[str, ...]:
    """The paths that a member or packed `name` of the module at `paths` would have."""
    return tuple(dict.fromkeys(renamed(path, name) for path in paths))


def spans(sizes: Sequence[int], rows: Sequence[int | None]) -> list[set[tuple[int, int]]]:
    """The slices that each of several names may cover, by its number of rows, None if unknown:
    every (start, end) in some partition of the slices `sizes`, in the order of names. All sets are
    empty if there is no partition."""
    offsets = (0, *accumulate(sizes))

    def ends_from(start: int, count: int | None) -> list[int]:
        ends = range(start + 1, len(offsets))
        return [end for end in ends if count in (None, offsets[end] - offsets[start])]

    reached = [{0}]
    for count in rows:
        reached.append({end for start in reached[-1] for end in ends_from(start, count)})
    ends = {len(sizes)} & reached[-1]
    spans_by_name: list[set[tuple[int, int]]] = []
    for starts, count in zip(reversed(reached[:-1]), reversed(rows), strict=True):
        pairs = {(start, end) for start in starts for end in ends_from(start, count) if end in ends}
        ends = {start for start, _ in pairs}
        spans_by_name.append(pairs)
    return spans_by_name[::-1]
