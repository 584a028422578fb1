"""What lorafx would make of a model, as a report: no graph was captured, and no weight was read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafx.model.module_graph import joined
from lorafx.reports.glossary import glossary_of
from lorafx.reports.table import html_table, over, size, text_table
from lorafx.reports.writing import json_values

NoteKind = Literal[
    "refused", "device", "packs", "training", "not selected", "alias", "tied", "capacity"
]


@dataclass(frozen=True)
class PredictedSites:
    """Sites that differ in nothing but the indices of their paths.

    Attributes:
        paths: the canonical path of each.
        cls, registered: their class, and the registered one that made them sites.
        in_features, out_features: K and N; for embeddings K is the vocabulary.
        experts: E of a parameter that holds the weights of E experts; 1 for others.
        parts: name and columns of each projection that the module computes, where it is several;
            the name is "" where adapters have none for it.
        dtype: of the base weight, or that it is computed in.
        weight_bytes: of one base weight, as it is stored.
        own_rows: how many rows of the weight an adapter may have of its own.
        pack: the names of the sites that one node is predicted to compute, itself included.
    """

    paths: tuple[str, ...]
    cls: str
    registered: str
    in_features: int
    out_features: int
    experts: int
    parts: tuple[tuple[str, int], ...]
    dtype: str
    weight_bytes: int
    own_rows: int
    pack: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return joined(self.paths)

    @property
    def sizes(self) -> str:
        parts = ", ".join(f"{name or '-'} {columns}" for name, columns in self.parts)
        experts = f"{self.experts} x " if self.experts > 1 else ""
        return f"{experts}{self.in_features} -> {self.out_features}" + (parts and f" [{parts}]")


@dataclass(frozen=True)
class PredictedPack:
    """Nodes that are alike: each computes one site, or siblings over one weight buffer.

    Attributes:
        paths: of each node the path of the module that holds its sites.
        members: the sites' own names.
        bank_bytes: of the bank behind one node. Siblings whose weights cannot be packed are nodes
            of their own and share one bank; this is the node's part of it.
        floors: for numbers of distinct adapters in a batch, the least traffic over that of the base
            alone: 1 + bytes of A and B / bytes of W; None where the base reads no weight as a whole
            (embeddings). Routed experts are all taken to have rows of each adapter.
    """

    paths: tuple[str, ...]
    members: tuple[str, ...]
    bank_bytes: int
    floors: tuple[tuple[int, float | None], ...]

    @property
    def pattern(self) -> str:
        own = " + ".join(self.members)
        return own if self.paths == ("",) else f"{joined(self.paths)}: {own}"


@dataclass(frozen=True)
class Note:
    """What one should know before compiling: of what kind, about which modules, and what."""

    kind: NoteKind
    paths: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Totals:
    """Sums over the model.

    Attributes:
        model_bytes: of all parameters, each storage once.
        weight_bytes: of the sites' base weights.
        bank_bytes: of all banks, which are on the device from the start.
        adapter_bytes: of the factors of one adapter of the largest rank on all sites.
        floors: as of a pack, over the sites alone, not over the whole model.
    """

    sites: int
    nodes: int
    model_bytes: int
    weight_bytes: int
    bank_bytes: int
    adapter_bytes: int
    floors: tuple[tuple[int, float | None], ...]


@dataclass(frozen=True)
class Prediction:
    """What `lorafx.explain(model, lora_config)` tells of a model that is not compiled.

    Modules decide which sites exist, which banks they get and which weights can be packed; which
    siblings share an input is seen in a forward on the meta device. That each use of a weight is
    understood, and that rows can be proved, only a captured graph shows; `cm.explain()` has that.

    Attributes:
        model: class of the model.
        slots, max_rank, slot_rank: of the banks.
        room: what the banks have room for beside factors, and no floor includes.
        sites, packs: by the order of the model.
    """

    model: str
    slots: int
    max_rank: int
    slot_rank: int
    room: tuple[str, ...]
    sites: tuple[PredictedSites, ...]
    packs: tuple[PredictedPack, ...]
    totals: Totals
    notes: tuple[Note, ...]

    def json(self) -> dict[str, Any]:
        """The fields, of JSON's own types; null for what is no finite number."""
        found: dict[str, Any] = json_values(asdict(self))
        rows = [*found["sites"], *found["packs"]]
        patterns = [item.pattern for item in self.sites] + [item.pattern for item in self.packs]
        for row, pattern in zip(rows, patterns, strict=True):
            row["pattern"] = pattern
        return found

    def __str__(self) -> str:
        lines = [f"{self.model}, before anything runs", *(f"  {line}" for line in self._summary())]
        for title, columns, rows in self._tables():
            lines += [title, *(f"  {line}" for line in text_table(columns, rows))]
        if self.notes:
            lines += ["notes", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def glossary(self) -> str:
        """What the words of the report mean, a line each."""
        return glossary_of(str(self))

    def _repr_html_(self) -> str:
        told = html_table(
            f"{self.model}, before anything runs", ("",), [[line] for line in self._summary()]
        )
        tables = "".join(html_table(*table) for table in self._tables())
        notes = [(note.kind, note.text) for note in self.notes]
        return told + tables + (html_table("notes", ("kind", "what"), notes) if notes else "")

    def _summary(self) -> list[str]:
        all_of = self.totals
        floors = ", ".join(
            f"{over(floor)} with {count} adapter{'s' * (count > 1)}"
            for count, floor in all_of.floors
        )
        lines = [
            f"weights {size(all_of.model_bytes)}, those of the sites {size(all_of.weight_bytes)}; "
            f"banks {size(all_of.bank_bytes)}; one adapter of rank {self.max_rank} on all sites "
            f"{size(all_of.adapter_bytes)}",
            f"least traffic of the sites over the base's: {floors}, adapters of rank "
            f"{self.slot_rank}",
        ]
        if self.room:
            lines.append(f"not in these figures: {', '.join(self.room)}")
        return lines

    def _tables(self) -> list[tuple[str, tuple[str, ...], list[list[object]]]]:
        beside = "".join(f" and {name}" for name in self.room)
        if self.slot_rank < self.max_rank:
            beside = f", room for rank {self.slot_rank} in each{beside}"
        sites: list[list[object]] = [
            [
                row.pattern,
                len(row.paths),
                row.cls if row.cls == row.registered else f"{row.cls} as {row.registered}",
                row.sizes + (f", {row.own_rows} rows of an adapter's own" if row.own_rows else ""),
                row.dtype,
                size(row.weight_bytes),
                " + ".join(row.pack) if len(row.pack) > 1 else "alone",
            ]
            for row in self.sites
        ]
        packs: list[list[object]] = [
            [
                pack.pattern,
                len(pack.paths),
                size(pack.bank_bytes),
                *(over(floor) for _, floor in pack.floors),
            ]
            for pack in self.packs
        ]
        return [
            (
                f"sites: {self.totals.sites}",
                ("site", "count", "class", "in -> out", "dtype", "weight, each", "pack"),
                sites,
            ),
            (
                f"packs: {self.totals.nodes}, {self.slots} slots of rank up to "
                f"{self.max_rank}{beside}",
                (
                    "pack",
                    "count",
                    "bank, each",
                    *(f"floor, {count}" for count, _ in self.totals.floors),
                ),
                packs,
            ),
        ]
