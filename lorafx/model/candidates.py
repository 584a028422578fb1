"""What `select` may choose: a model's modules with all names that a target may use for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch import nn

from lorafx.model import targets
from lorafx.model.experts import ExpertWeight, folded, own_names
from lorafx.model.packed_names import PackedNames, parts_of, virtual_paths
from lorafx.model.refusals import unsupported
from lorafx.model.sites import Part
from lorafx.model.weight_formats import is_dense
from lorafx.registry import Eligible, lookup


class Candidate:
    """A module with its names. `members` are those that it stands for if packed, else "" alone."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        paths: tuple[str, ...],
        entry: Eligible | None,
        packed: PackedNames,
    ) -> None:
        self.path, self.module, self.paths, self.entry = path, module, paths, entry
        self.packed_members = packed.members(path) if entry is not None else ()
        self.member_of = packed.memberships(path) if entry is not None else ()
        self.members = frozenset(member.name for member in self.packed_members) or frozenset([""])

    #: For a parameter of routed experts.
    expert_weight: ExpertWeight | None = None

    @property
    def label(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__qualname__})"

    @property
    def all_paths(self) -> Iterator[str]:
        yield from self.paths
        others = [member.name for member in self.packed_members]
        for name in (*others, *(packed.name for packed in self.member_of)):
            yield from virtual_paths(self.paths, name)

    def parts(
        self, slices: Sequence[int] | None, in_features: int, out_features: int
    ) -> tuple[Part, ...]:
        return parts_of("it", self.packed_members, slices, in_features, out_features)

    def named_by(self, spec: str | Sequence[str]) -> frozenset[str]:
        """The members that `spec` names, all of them where it names the module itself."""
        whole = self.paths
        for packed in self.member_of:
            whole += virtual_paths(self.paths, packed.name)
        if targets.names(spec, whole):
            return self.members
        return frozenset(
            member.name
            for member in self.packed_members
            if targets.names(spec, virtual_paths(self.paths, member.name))
        )


class ExpertsCandidate(Candidate):
    def __init__(
        self,
        path: str,
        module: nn.Module,
        paths: tuple[str, ...],
        weight: ExpertWeight,
        packed: PackedNames,
    ) -> None:
        weight_paths = tuple(weight.path(p) for p in paths)
        entry = weight.eligible(lookup(module))
        super().__init__(weight.path(path), module, weight_paths, entry, packed)
        self.module_paths, self.weight, self.expert_weight = paths, weight, weight

    def parts(
        self, slices: Sequence[int] | None, in_features: int, out_features: int
    ) -> tuple[Part, ...]:
        """Gate and up as two parts if their columns are apart: older adapters have an A for
        each."""
        count = 2 if self.weight.halves == "stacked" else 1
        size = out_features // count
        return tuple(Part("", (i,), in_features, size) for i in range(count))

    @property
    def all_paths(self) -> Iterator[str]:
        yield from (*self.paths, *self.module_paths)
        for path in self.module_paths:
            yield from own_names(self.weight, path)

    def named_by(self, spec: str | Sequence[str]) -> frozenset[str]:
        if not isinstance(spec, str):
            named = targets.names(_folded(targets.Entries(spec)), self.all_paths)
            return self.members if named else frozenset()
        for expert in range(self.weight.experts):
            names = (n for p in self.module_paths for n in own_names(self.weight, p, expert))
            if targets.names(spec, names):
                return self.members
        return self.members if targets.names(spec, self.all_paths) else frozenset()


@functools.lru_cache(maxsize=4)  # a list of targets is asked about by every module
def _folded(entries: targets.Entries) -> targets.Entries:
    return targets.Entries(folded(entry) for entry in entries)


def by_raw_weight(module: nn.Module) -> Eligible | None:
    """An entry for a module of no registered class that holds one matrix, or a `weight`: a router,
    or a name in PEFT's `target_parameters`. `match` finds where it multiplies."""
    held = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 2}
    name = "weight" if "weight" in held or len(held) != 1 else next(iter(held))
    weight = held.get(name)
    if weight is None or not is_dense(weight) or unsupported(module):
        return None
    out_features, in_features = weight.shape
    return Eligible(nn.Module, "linear", lambda _: (in_features, out_features), weight=name)
