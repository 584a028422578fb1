"""A profile: where the time of a call goes, by site."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorafx.inspection.report import Report, over, text_table
from lorafx.model.module_graph import joined, shape_of


@dataclass(frozen=True)
class ProfiledNode:
    """A node of a graph, or a sum of equal nodes.

    Attributes:
        paths: its sites; the time of a pack is not divided among them.
        calls: how often it runs in a call of the model.
        base, delta: seconds of the base's product and of LoRA per call of the model; None if a
            single operator computes both.
        whole: their sum.
        floor: least traffic with this batch's adapters relative to the base's; None if the base
            does not read the whole weight.
        nodes: the number of summed nodes.
    """

    paths: tuple[str, ...]
    form: str
    strategy: str
    calls: int
    base: float | None
    delta: float | None
    whole: float
    floor: float | None
    nodes: int = 1

    @property
    def measured(self) -> float | None:
        """(base + delta) / base, if known separately."""
        return self.whole / self.base if self.base else None


@dataclass(frozen=True)
class Profile(Report):
    """The result of `cm.profile`. All times are seconds of one call of the model.

    Attributes:
        device: "cpu", or the GPU's name.
        rows, adapters: requests of the batch, and its distinct adapters.
        calls: the number of averaged calls.
        served: median wall time of a served call.
        way: how these calls were served, "compiled" or "eager".
        operators: the graphs run operator by operator, without Python's overhead.
        others: the part of `operators` that belongs to no site.
        unreached: sites that this call does not run.
        notes: limits of the figures.
    """

    model: str
    device: str
    lowering: str
    rows: int
    adapters: int
    calls: int
    served: float
    way: str
    operators: float
    others: float
    nodes: tuple[ProfiledNode, ...]
    unreached: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sites(self) -> float:
        return sum(node.whole for node in self.nodes)

    @property
    def alike(self) -> tuple[ProfiledNode, ...]:
        """Sums of nodes whose sites differ only in the indices of their paths."""
        nodes: dict[object, list[ProfiledNode]] = {}
        for node in self.nodes:
            shapes = tuple(map(shape_of, node.paths))
            key = (shapes, node.form, node.strategy, node.base is None)
            nodes.setdefault(key, []).append(node)
        return tuple(map(_sum_of_nodes, nodes.values()))

    def derived(self) -> dict[str, Any]:
        nodes = [{**asdict(node), "measured": node.measured} for node in self.nodes]
        return {"sites": self.sites, "nodes": nodes}

    @property
    def heading(self) -> str:
        return (
            f"{self.model}, {self.rows} requests with {self.adapters} adapters, {self.device}, "
            f"{self.lowering}: {_ms(self.served)} ms as served ({self.way}); operator by operator "
            f"{_ms(self.operators)} ms, sites {_ms(self.sites)}, others {_ms(self.others)}"
        )

    def table(self) -> list[str]:
        rows = [
            (
                " + ".join(_short_names(node.paths)),
                node.nodes,
                _ms(node.base),
                _ms(node.delta),
                _ms(node.whole),
                over(node.measured),
                over(node.floor),
                node.strategy or node.form,
            )
            for node in self.alike
        ]
        columns = ("sites", "nodes", "base, ms", "delta, ms", "both, ms", "over base", "floor")
        return text_table((*columns, "how"), rows)

    def notes_as_lines(self) -> list[str]:
        alike: dict[str, list[str]] = {}
        for path in self.unreached:
            alike.setdefault(shape_of(path), []).append(path)
        paths = ", ".join(map(joined, alike.values()))
        unreached = [f"not run in this call: {paths}"] if paths else []
        return [*unreached, *(f"note: {note}" for note in self.notes)]


def _sum_of_nodes(nodes: Sequence[ProfiledNode]) -> ProfiledNode:
    separate = nodes[0].base is not None
    floors = [node.floor for node in nodes]
    return replace(
        nodes[0],
        paths=tuple(map(joined, zip(*(node.paths for node in nodes), strict=True))),
        calls=sum(node.calls for node in nodes),
        base=sum(node.base or 0.0 for node in nodes) if separate else None,
        delta=sum(node.delta or 0.0 for node in nodes) if separate else None,
        whole=sum(node.whole for node in nodes),
        floor=floors[0] if len({*floors}) == 1 else statistics.mean(f or 1.0 for f in floors),
        nodes=len(nodes),
    )


def _short_names(paths: Sequence[str]) -> list[str]:
    return [paths[0] or "(root)", *(path.rpartition(".")[2] for path in paths[1:])]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"
