"""The checks of a compiled graph before it serves a call.

Dynamo calls a graph for other layers and models of the same class too, so no module or weight is
kept here: sites are known by their paths, and the tensors of the running call identify them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorafx.errors import BatchError, CaptureError, MatchError, ProvenanceError
from lorafx.model.extras import EXTRAS, When
from lorafx.model.sites import Site
from lorafx.ownership.labels import One
from lorafx.program.argument_roles import Role
from lorafx.program.frame import Frame
from lorafx.program.program import Program
from lorafx.program.refusals import UNSEEN, LastingRefusal
from lorafx.program.row_handoff import Handover, Rows
from lorafx.program.weight_forms import WeightForm

_ELSEWHERE = "a tensor comes from another place than when the graph was captured"


@dataclass(eq=False)
class Checks:
    """The checks of a graph, and the positions of its inputs among its arguments.

    Attributes:
        begins_call, inside: as in `Frame`; per_token: as in its `slots`.
        weights, banks: site path -> position, and index among the weight's or the group's sites.
        requests: (position, dimension) of inputs that carry requests.
        arguments: position -> role of the inputs that are arguments of the call at capture.
        plain: positions of matrices and stacks that may be a site's weight in another call.
        derived: path, position and form of each tensor that contains part of a site's weight.
        choices: positions and names of the call's arguments that hold several sequences for each
            request in dimension 1; all must hold the same number.
        number: the number of requests of the graph, if each input belongs to a single request.
        sites: the paths of the sites that the graph computes.
    """

    begins_call: bool
    per_token: bool = False
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    banks: dict[str, tuple[int, int]] = field(default_factory=dict)
    requests: list[tuple[int, int]] = field(default_factory=list)
    arguments: dict[int, Role] = field(default_factory=dict)
    plain: list[int] = field(default_factory=list)
    derived: list[tuple[str, int, WeightForm | None]] = field(default_factory=list)
    choices: list[tuple[int, str]] = field(default_factory=list)
    number: int | None = None
    sites: list[str] = field(default_factory=list)
    refusals: list[LastingRefusal] = field(default_factory=list)
    handover: Handover = field(default_factory=Handover)
    inside: dict[tuple[int, int], bool] = field(default_factory=dict)

    @classmethod
    def of(cls, frame: Frame, examples: Sequence[Any]) -> Checks:
        """The checks of a frame whose inputs are `examples`."""
        checks = cls(frame.begins_call, frame.slots.per_token)
        for position, (item, example) in enumerate(zip(frame.inputs, examples, strict=True)):
            for index, site in enumerate(item.sites):
                if item.derived is None:
                    checks.weights[site.path] = position, index
                else:
                    checks.weights.setdefault(site.path, (position, index))
                    checks.derived.append((site.path, position, item.derived.form))
            if item.group is not None and item.kind == "bank" and item.label == "A":
                for index, site in enumerate(item.group.sites):
                    checks.banks[site.path] = position, index
            if item.role is not None and item.role.request is not None:
                checks.number = item.role.requests
            dim = item.requests_dim
            if dim is not None and dim < example.dim():
                checks.requests.append((position, dim))
                if frame.has_choices(item):
                    checks.choices.append((position, item.label))
            if item.kind == "argument" and item.role is not None and not frame.begins_call:
                checks.arguments[position] = item.role
            if item.kind == "state" and example.dim() > 1 and not frame.begins_call:
                checks.plain.append(position)
        return checks

    @property
    def conditional(self) -> bool:
        return bool(self.refusals or self.plain or self.derived or self.choices)

    def check(self, program: Program, arguments: Sequence[Any], *, alone: bool = False) -> None:
        """Refuse the running batch if this graph cannot serve it. `alone`: all rows belong to one
        request.

        Raises:
            CaptureError: an adapter touches a layer for which the graph has no LoRA.
            MatchError: LoRA, DoRA or a replaced weight cannot be applied to a use of a touched
                weight.
            ProvenanceError: mixed adapters at a site whose rows have no proved owner.
            BatchError: arguments hold different numbers of sequences for each request.
        """
        mixed = not program.runtime.uniform
        if mixed and len({arguments[position].shape[1] for position, _ in self.choices}) > 1:
            shapes = ", ".join(f"{name} {tuple(arguments[p].shape)}" for p, name in self.choices)
            raise BatchError(
                f"the arguments hold different numbers of sequences for each request: {shapes}; "
                "give (B, C, T) of all of them, with the same number C"
            )
        sites = [program.site_of_part(arguments[position]) for position in self.plain]
        unserved = [site.path for site in sites if site and program.is_touched(site)]
        if unserved:
            raise CaptureError(
                f"{', '.join(unserved)} shares a graph with a layer of the same class that "
                "carries no LoRA; name the module by target_modules in all layers of that "
                "class, or in none"
            )
        changed = self._changed_sites(program, arguments)
        if changed:
            raise MatchError(
                f"a tensor that was made from the weight of {', '.join(changed)} has "
                "changed since the graph was captured, so LoRA cannot be applied to it. "
                "Call torch._dynamo.reset() after post-processing the weights again, or "
                "use exclude_modules"
            )
        for refusal in self.refusals:
            if refusal.when == "mixed" and (alone or not mixed):
                continue
            touched = self._touched_sites(program, refusal.sites, arguments, when=refusal.when)
            if touched:
                call = program.call
                unseen = call is not None and call.memory.unseen
                eagerly = program.options.start == "eager"
                raise refusal.error(", ".join(touched), unseen=unseen, eagerly=eagerly)

    def refuse_changed(self, program: Program, arguments: Sequence[Any]) -> None:
        """Raise ProvenanceError if the batch touches a site, whose rows are not known any more."""
        touched = self._touched_sites(program, self.sites, arguments)
        if touched:
            unseen = program.call is not None and program.call.memory.unseen
            raise ProvenanceError(
                f"this batch mixes adapters, and at {', '.join(touched)} "
                f"{UNSEEN if unseen else _ELSEWHERE}, so row ownership is not proved there. Run "
                "one adapter per batch"
            )

    def rows(self, program: Program, arguments: Sequence[Any]) -> Rows | None:
        """The owners of the graph's rows in the running call, or None if they are not known."""
        assert program.call is not None
        rows = self.handover.rows(
            program.call.memory, arguments, len(program.runtime.rows), self.arguments
        )
        if isinstance(rows, One) or program.runtime.uniform:
            return rows
        if not self.begins_call and self.row_count(arguments) == 1:
            return None  # the graph was captured for one request
        if not self.arguments:
            return rows
        known = program.call_arguments()
        same = all(
            isinstance(tensor := arguments[position], Tensor) and known.get(id(tensor)) == role
            for position, role in self.arguments.items()
        )
        return rows if same else None

    def row_count(self, arguments: Sequence[Any]) -> int | None:
        """The number of requests, by the sizes of the inputs."""
        sizes = [arguments[position].shape[dim] for position, dim in self.requests]
        return max(sizes) if sizes else self.number

    def _touched_sites(
        self,
        program: Program,
        paths: Sequence[str],
        arguments: Sequence[Any],
        *,
        when: When = "always",
    ) -> list[str]:
        """Those of the sites at `paths` that the batch touches in the way that `when` names."""
        sites = [self._site_at(program, path, arguments) for path in paths]
        batch = program.batch
        concerned = batch.extras.get(when, frozenset()) if when in EXTRAS else batch.touched
        return [site.path or "(root)" for site in sites if site and site.path in concerned]

    def _site_at(self, program: Program, path: str, arguments: Sequence[Any]) -> Site | None:
        if path in self.weights:
            position, index = self.weights[path]
            return program.site_of_weight(arguments[position], index)
        if path in self.banks:
            position, index = self.banks[path]
            group = program.group_of_bank(arguments[position])
            return None if group is None else group.sites[index]
        return next((site for site in program.sites if site.path == path), None)

    def _changed_sites(self, program: Program, arguments: Sequence[Any]) -> list[str]:
        """Paths of touched sites whose derived inputs no longer contain their weight."""
        changed: set[str] = set()
        for path, position, form in self.derived:
            view = program.derived.look(arguments[position])
            if view is not None and view.form == form:
                continue
            sites = [s for s in program.sites if s.path == path] if view is None else view.sites
            changed.update(site.path for site in sites if program.is_touched(site))
        return sorted(changed)
