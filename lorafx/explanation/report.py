"""`explain`: what lorafx made of a model, as values with an HTML and a text form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lorafx.program.preparation import PassReport
from lorafx.reports.glossary import glossary_of
from lorafx.reports.writing import json_values

if TYPE_CHECKING:
    from lorafx.session.session import Session


@dataclass(frozen=True)
class SiteReport:
    """A module, or a weight of routed experts, that carries LoRA.

    Attributes:
        path, aliases: its canonical path, and the others that reach it.
        cls, registered: its class, and the registered one along its MRO that made it a site.
        in_features, out_features: K and N; for embeddings K is the vocabulary.
        dtype: of its base weight.
        parts: name and columns of each projection that it computes, where there are several; "-"
            for one that has no name or was not selected.
        loose: names of projections that the rows of an adapter's B tell apart.
        own_rows: how many rows of its weight an adapter may have of its own.
    """

    path: str
    aliases: tuple[str, ...]
    cls: str
    registered: str
    in_features: int
    out_features: int
    dtype: str
    parts: tuple[tuple[str, int], ...] = ()
    loose: tuple[str, ...] = ()
    own_rows: int = 0


@dataclass(frozen=True)
class BankReport:
    """The factors of all slots for the sites of one group. `parent` is the path of the module that
    holds the sites, `names` are their last names, `nbytes` its size on the device in bytes."""

    parent: str
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class AdapterReport:
    """A loaded adapter.

    Attributes:
        name, source, rank, notes: as in the adapter's file.
        sites: canonical paths of the modules that it reaches.
        slot: its slot on the device; None where it is in host memory or on disk.
        pinned, merged: whether it keeps the slot, and whether the base weights hold it.
        norms: by site, the Frobenius norm of ΔW = s·B A. None where its numbers are not in host
            memory now, or were not asked for.
        idle: the sites where it changes nothing.
        why_idle: why, if it changes nothing anywhere; "" otherwise.
    """

    name: str
    source: str
    rank: int
    sites: tuple[str, ...]
    slot: int | None
    pinned: bool = False
    merged: bool = False
    norms: Mapping[str, float] | None = None
    idle: tuple[str, ...] = ()
    why_idle: str = ""
    notes: tuple[str, ...] = ()

    @property
    def norm(self) -> float | None:
        """The Frobenius norm of all of ΔW; None as `norms`."""
        return None if self.norms is None else sum(v * v for v in self.norms.values()) ** 0.5


@dataclass(frozen=True)
class NodeReport:
    """One node of a graph that adds deltas.

    Attributes:
        sites: the sites that it serves: several where siblings were packed.
        form: "packed", "fused" (with the base's product), "mark" (the hook's own op) or
            "rewritten" (a use of the weight without its module).
        strategy: how it is computed, and why.
        rows: which rows of x belong to which request.
    """

    sites: tuple[str, ...]
    form: str
    strategy: str
    rows: str


@dataclass(frozen=True)
class RefusalReport:
    """Sites that a graph cannot serve, for which batches ("always", "mixed", ...), and why."""

    sites: tuple[str, ...]
    when: str
    reason: str


@dataclass(frozen=True)
class GraphReport:
    """A compiled graph.

    Attributes:
        title: "graph 0 lora".
        lora: whether it serves calls with adapters.
        serves: what kind of call it is for, in words.
        reason: why no earlier graph serves that call.
        seconds: what compiling it took, by whom: "Dynamo", "AOTAutograd", "passes" (lorafx's), and
            the lowering; "loading" of a saved graph.
        passes: what each pass did.
        nodes: the nodes that add deltas.
        refusals: what it cannot serve.
        outlined: repeated layers that are computed by one body.
        saved: what became of it in the folder of saved graphs.
        verified: the result of `Options(verify="numeric")`; "" where that is off.
    """

    title: str
    lora: bool
    serves: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    passes: tuple[PassReport, ...] = ()
    nodes: tuple[NodeReport, ...] = ()
    refusals: tuple[RefusalReport, ...] = ()
    outlined: tuple[str, ...] = ()
    saved: str = ""
    verified: str = ""


@dataclass(frozen=True)
class Explanation:
    """What lorafx made of a model. `str()` is the whole report, `json()` its values.

    Attributes:
        model: the model's class.
        lowering: how its graphs become code.
        sites, banks, adapters, graphs: see there.
        slots, max_rank: adapters that the device holds, and their largest rank.
        slot_rank: the rank that each slot has room for by itself, where slots share room.
        room: what banks have room for beside factors: "DoRA's scales", "biases", "weights of
            adapters' own".
        passes: the passes in their order, as `lorafx.pipeline()` prints them.
        shortcuts_off: why shortcuts are off, by name; those that are on are not in it.
        prepared: what each pass over the model found and did; `notes` are its lines.
        unreached: sites that no graph has reached yet.
        replaced: what is not where it was when lorafx was given the model.
    """

    model: str
    lowering: str
    sites: tuple[SiteReport, ...]
    banks: tuple[BankReport, ...]
    slots: int
    max_rank: int
    slot_rank: int | None = None
    room: tuple[str, ...] = ()
    adapters: tuple[AdapterReport, ...] = ()
    passes: tuple[str, ...] = ()
    shortcuts_off: Mapping[str, str] = field(default_factory=dict)
    prepared: tuple[PassReport, ...] = ()
    graphs: tuple[GraphReport, ...] = ()
    unreached: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    @classmethod
    def of(cls, session: Session) -> Explanation:
        """The report on a compiled model."""
        from lorafx.explanation.collecting import report_of

        return report_of(session)

    @property
    def refusals(self) -> tuple[RefusalReport, ...]:
        """Those of all graphs."""
        return tuple(refusal for graph in self.graphs for refusal in graph.refusals)

    @property
    def seconds(self) -> dict[str, float]:
        """What compiling all graphs took, by whom."""
        found: dict[str, float] = {}
        for graph in self.graphs:
            for what, seconds in graph.seconds.items():
                found[what] = found.get(what, 0.0) + seconds
        return found

    @property
    def summary(self) -> tuple[str, ...]:
        """The report in five lines."""
        from lorafx.explanation.text import summary

        return summary(self)

    @property
    def sections(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The report as text, by section."""
        from lorafx.explanation.text import sections

        return sections(self)

    def json(self) -> dict[str, Any]:
        """The fields, the summary and sums, of JSON's own types; null for what is no finite
        number, such as the norm of an adapter that holds NaN."""
        found: dict[str, Any] = json_values(
            {
                **asdict(self),
                "adapters": [{**asdict(own), "norm": own.norm} for own in self.adapters],
                "seconds": self.seconds,
                "summary": self.summary,
            }
        )
        return found

    def __str__(self) -> str:
        parts = list(self.summary)
        for title, lines in self.sections:
            parts.append(title)
            parts.extend(f"  {line}" for line in lines)
        return "\n".join(parts)

    def glossary(self) -> str:
        """What the words of the report mean, a line each."""
        return glossary_of(str(self))

    def _repr_html_(self) -> str:
        """For notebooks: the summary, and tables that open."""
        from lorafx.explanation.html import page

        return page(self)
