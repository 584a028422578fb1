"""Times of a call by site, beside the byte floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorafx.inspection.report import Report, Table, over
from lorafx.model.module_graph import joined, shape_of


@dataclass(frozen=True)
class ProfiledNode:
    """A node of a graph, or a sum of equal nodes.

    Attributes:
        paths: its sites; the time of a pack is not divided among them.
        calls: how often it runs in a call of the model.
        base, delta: seconds per call of the model of the base's product and of LoRA; None where a
            single operator does both.
        whole: their sum.
        floor: least traffic with this batch's adapters relative to the base's; None where the base
            reads no weight as a whole.
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
        found: dict[object, list[ProfiledNode]] = {}
        for node in self.nodes:
            shapes = tuple(map(shape_of, node.paths))
            key = (shapes, node.form, node.strategy, node.base is None)
            found.setdefault(key, []).append(node)
        return tuple(map(_together, found.values()))

    def by_site(self) -> dict[str, str]:
        """Path -> times in words."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for path in node.paths:
                found.setdefault(path, []).append(_in_words(node))
        return {path: "; ".join(texts) for path, texts in found.items()}

    def derived(self) -> dict[str, Any]:
        nodes = [{**asdict(node), "measured": node.measured} for node in self.nodes]
        return {"sites": self.sites, "nodes": nodes}

    @property
    def heading(self) -> str:
        return (
            f"{self.model}, {self.rows} requests with {self.adapters} adapters, {self.device}, "
            f"{self.lowering}: {_ms(self.served)} ms as served; operator by operator "
            f"{_ms(self.operators)} ms, sites {_ms(self.sites)}, others {_ms(self.others)}"
        )

    def tables(self) -> list[Table]:
        rows = [
            (
                " + ".join(_names(node.paths)),
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
        return [Table("", (*columns, "how"), rows)]

    def notes_as_lines(self) -> list[str]:
        alike: dict[str, list[str]] = {}
        for path in self.unreached:
            alike.setdefault(shape_of(path), []).append(path)
        paths = ", ".join(map(joined, alike.values()))
        unreached = [f"not run in this call: {paths}"] if paths else []
        return [*unreached, *(f"note: {note}" for note in self.notes)]


def _together(nodes: Sequence[ProfiledNode]) -> ProfiledNode:
    first = nodes[0]
    apart = first.base is not None
    floors = [node.floor for node in nodes]
    same = all(floor == floors[0] for floor in floors)
    mean = sum(floor or 1.0 for floor in floors) / len(floors)
    return ProfiledNode(
        tuple(joined([node.paths[at] for node in nodes]) for at in range(len(first.paths))),
        first.form,
        first.strategy,
        sum(node.calls for node in nodes),
        sum(node.base or 0.0 for node in nodes) if apart else None,
        sum(node.delta or 0.0 for node in nodes) if apart else None,
        sum(node.whole for node in nodes),
        floors[0] if same else mean,
        len(nodes),
    )


def _names(paths: Sequence[str]) -> list[str]:
    return [paths[0] or "(root)", *(path.rpartition(".")[2] for path in paths[1:])]


def _in_words(node: ProfiledNode) -> str:
    text = f"{_ms(node.whole)} ms"
    if node.base is not None:
        text += f": product {_ms(node.base)}, delta {_ms(node.delta)}"
    if node.measured is not None:
        text += f", {over(node.measured)} over the product"
    if node.floor is not None:
        text += f", byte floor {over(node.floor)}"
    others = len(node.paths) - 1
    siblings = "sibling" if others == 1 else "siblings"
    return text + (f", with {others} {siblings}" if others else "")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"
