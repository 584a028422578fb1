"""The checks of a compiled graph before it serves a call.

Dynamo calls a graph for other layers and models of the same class too. So no module or weight is
kept here: sites are paths, and the running call's tensors identify them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorafx.errors import BatchError, CaptureError, LorafxError, MatchError, ProvenanceError
from lorafx.model.extras import EXTRAS, When
from lorafx.model.sites import Site
from lorafx.ownership.memory import Alone
from lorafx.program.argument_roles import Role
from lorafx.program.derived import WeightForm
from lorafx.program.frame import Frame
from lorafx.program.program import Program
from lorafx.program.row_handoff import Handover, Rows
from lorafx.torch_internals.frames import size_expression


@dataclass
class InputPlaces:
    """Positions of a graph's inputs among its arguments.

    Attributes:
        weights, banks: site path -> position, and index among the weight's or the group's sites.
        requests: (position, dimension, name) of inputs that carry requests.
        arguments: position -> role of call arguments that may be something else in another call.
        plain: positions of matrices (and stacks) that may be a site's weight in another call.
        derived: path, position and form of each tensor that contains part of a site's weight.
        choices: arguments of the call with several sequences a request in dimension 1, equally
            many.
        number: how many requests the graph is for, if its inputs are of one request each.
    """

    weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    banks: dict[str, tuple[int, int]] = field(default_factory=dict)
    requests: list[tuple[int, int, str]] = field(default_factory=list)
    arguments: dict[int, Role] = field(default_factory=dict)
    plain: list[int] = field(default_factory=list)
    derived: list[tuple[str, int, WeightForm | None]] = field(default_factory=list)
    choices: list[tuple[int, int, str]] = field(default_factory=list)
    number: int | None = None

    @classmethod
    def of(cls, frame: Frame, examples: Sequence[Any]) -> InputPlaces:
        """The places in a frame whose inputs are `examples`."""
        places = cls()
        for position, (item, example) in enumerate(zip(frame.inputs, examples, strict=True)):
            for index, site in enumerate(item.sites):
                if item.derived is None:
                    places.weights[site.path] = position, index
                else:
                    places.weights.setdefault(site.path, (position, index))
                    places.derived.append((site.path, position, item.derived.form))
            if item.group is not None and item.kind == "bank" and item.label == "A":
                for index, site in enumerate(item.group.sites):
                    places.banks[site.path] = position, index
            if item.role is not None and item.role.request is not None:
                places.number = item.role.requests
            dim = item.requests_dim
            if dim is not None and dim < example.dim():
                places.requests.append((position, dim, item.label))
                if frame.chosen(item):
                    places.choices.append((position, 1, item.label))
            if item.kind == "argument" and item.role is not None and not frame.begins_call:
                places.arguments[position] = item.role
            if item.kind == "state" and example.dim() > 1 and not frame.begins_call:
                places.plain.append(position)
        return places

    def look_once(self, values: Sequence[Any]) -> None:
        """After compilation, check only one of the inputs with request counts guarded equal."""
        self.requests = _of_different_sizes(self.requests, values)

    @property
    def conditional(self) -> bool:
        return bool(self.plain or self.derived or self.choices)

    def site(self, program: Program, path: str, arguments: Sequence[Any]) -> Site | None:
        if path in self.weights:
            position, index = self.weights[path]
            return program.site_of_weight(arguments[position], index)
        if path in self.banks:
            position, index = self.banks[path]
            group = program.group_of_bank(arguments[position])
            return None if group is None else group.sites[index]
        return next((site for site in program.sites if site.path == path), None)

    def touched(
        self,
        program: Program,
        paths: Sequence[str],
        arguments: Sequence[Any],
        *,
        when: When = "always",
    ) -> list[str]:
        """Paths of the running call's sites that a refusal for batches `when` concerns."""
        now = [self.site(program, path, arguments) for path in paths]
        batch = program.batch
        concerned = batch.extras.get(when, frozenset()) if when in EXTRAS else batch.touched
        return [site.path or "(root)" for site in now if site and site.path in concerned]

    def strangers(self, program: Program, arguments: Sequence[Any]) -> list[str]:
        """Paths of touched sites whose weights replace a plain input."""
        found = [program.site_of_part(arguments[position]) for position in self.plain]
        return [site.path for site in found if site and program.is_touched(site)]

    def changed(self, program: Program, arguments: Sequence[Any]) -> list[str]:
        """Paths of touched sites whose derived inputs no longer hold their weight."""
        found: set[str] = set()
        for path, position, form in self.derived:
            now = program.derived.look(arguments[position])
            if now is not None and now.form == form:
                continue
            sites = now.sites if now is not None else [s for s in program.sites if s.path == path]
            found.update(site.path for site in sites if program.is_touched(site))
        return sorted(found)

    def rows(self, arguments: Sequence[Any]) -> int | None:
        """The number of requests by the inputs."""
        sizes = [arguments[position].shape[dim] for position, dim, _ in self.requests]
        return max(sizes) if sizes else self.number

    def check_choices(self, arguments: Sequence[Any]) -> None:
        if len({arguments[position].shape[dim] for position, dim, _ in self.choices}) > 1:
            given = ", ".join(f"{n} {tuple(arguments[p].shape)}" for p, _, n in self.choices)
            raise BatchError(
                f"the arguments hold different numbers of sequences for each request: {given}; "
                "give (B, C, T) of all of them, with the same number C"
            )


def _of_different_sizes(
    places: Sequence[tuple[int, int, str]], values: Sequence[Any]
) -> list[tuple[int, int, str]]:
    """The first place of each size: a decode step has two inputs per layer."""
    found: dict[Any, tuple[int, int, str]] = {}
    for place in places:
        position, dim, _ = place
        value = values[position]
        size = size_expression(value.shape[dim]) if isinstance(value, Tensor) else place
        found.setdefault(size, place)
    return list(found.values())


_ELSEWHERE = "a tensor comes from another place than when the graph was captured"
_UNSEEN = (
    "the memory of a tensor was handed to numpy between two graphs, or written into where torch "
    "does not see it (by its address, DLPack, an extension; such code may have a copy, h.clone())"
)


@dataclass(frozen=True)
class RefusedSites:
    """Site paths that a graph cannot serve, in which batches, and why (`Refusal`)."""

    sites: tuple[str, ...]
    when: When
    reason: str

    def error(self, names: str, *, unseen: bool = False) -> LorafxError:
        """The error of a call with adapters here, whose memory was handed out if `unseen`."""
        if self.when in EXTRAS:
            extra = EXTRAS[self.when]
            return MatchError(
                f"{extra.unapplied.format(names)}: {self.reason}. Merge the adapter into a copy of "
                f"the base model, or train it without {extra.training}"
            )
        if self.when == "always":
            return MatchError(
                f"LoRA cannot be applied at {names}: {self.reason}. Leave the module out by "
                "exclude_modules, or unload the adapters that touch it"
            )
        return ProvenanceError(
            f"this batch mixes adapters, and at {names} it is not proved which request a row "
            f"belongs to: {_UNSEEN if unseen else self.reason}. Run one adapter per batch, "
            "declare which dimension of an argument holds the requests by LoraConfig("
            "row_dims=...), or leave the module out by exclude_modules"
        )


@dataclass(eq=False)
class Checks:
    """The checks of a graph for `sites`; `begins_call` and `inside` as in `Frame`. `several`, a
    list shared by the program's graphs: results are noted, since the model has several graphs."""

    places: InputPlaces
    begins_call: bool
    several: list[bool]
    sites: list[str] = field(default_factory=list)
    refusals: list[RefusedSites] = field(default_factory=list)
    handover: Handover = field(default_factory=Handover)
    inside: dict[tuple[int, int], bool] = field(default_factory=dict)

    def refuse_changed(self, program: Program, arguments: Sequence[Any]) -> None:
        """Raise ProvenanceError where an input of a touched site has changed since capture."""
        touched = self.places.touched(program, self.sites, arguments)
        if touched:
            unseen = program.call is not None and program.call.memory.unseen
            raise ProvenanceError(
                f"this batch mixes adapters, and at {', '.join(touched)} "
                f"{_UNSEEN if unseen else _ELSEWHERE}, so row ownership is not proved there. Run "
                "one adapter per batch"
            )

    def check(self, program: Program, arguments: Sequence[Any], *, alone: bool = False) -> None:
        """Refuse the running batch where this graph cannot serve it. `alone`: all rows belong to a
        single request.

        Raises:
            CaptureError: an adapter touches a layer for which the graph has no LoRA.
            MatchError: LoRA, DoRA or a replaced weight cannot be applied to a use of a touched
                weight.
            ProvenanceError: mixed adapters at a site whose rows have no proved owner.
            BatchError: as `InputPlaces.check_choices`.
        """
        if not program.runtime.uniform:
            self.places.check_choices(arguments)
        strangers = self.places.strangers(program, arguments)
        if strangers:
            raise CaptureError(
                f"{', '.join(strangers)} shares a graph with a layer of the same class that "
                "carries no LoRA; name the module by target_modules in all layers of that "
                "class, or in none"
            )
        changed = self.places.changed(program, arguments)
        if changed:
            raise MatchError(
                f"a tensor that was made from the weight of {', '.join(changed)} has "
                "changed since the graph was captured, so LoRA cannot be applied to it. "
                "Call torch._dynamo.reset() after post-processing the weights again, or "
                "use exclude_modules"
            )
        for refusal in self.refusals:
            if refusal.when == "mixed" and (alone or program.runtime.uniform):
                continue
            touched = self.places.touched(program, refusal.sites, arguments, when=refusal.when)
            if touched:
                call = program.call
                unseen = call is not None and call.memory.unseen
                raise refusal.error(", ".join(touched), unseen=unseen)

    def rows(self, program: Program, arguments: Sequence[Any]) -> Rows | None:
        """The owners of the graph's rows in the running call, if known."""
        assert program.call is not None
        of_call = self.places.arguments
        rows = self.handover.rows(
            program.call.memory, arguments, len(program.runtime.rows), of_call
        )
        if isinstance(rows, Alone) or program.runtime.uniform:
            return rows
        if not self.begins_call and self.places.rows(arguments) == 1:
            return None  # captured for one request
        return rows if self.arguments_hold(program, arguments) else None

    def arguments_hold(self, program: Program, arguments: Sequence[Any]) -> bool:
        if not self.places.arguments:
            return True
        known = program.call_arguments()
        return all(
            isinstance(tensor := arguments[position], Tensor) and known.get(id(tensor)) == role
            for position, role in self.places.arguments.items()
        )
