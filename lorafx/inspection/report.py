"""Reports: values with a text, JSON, and tables for notebooks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any, NamedTuple

#: Equal to docs/architecture.md for shared words.
WORDS: Mapping[str, str] = {
    "site": "a module, or a weight of routed experts, that carries LoRA",
    "part": "a range of a site's output columns with a name of its own, such as `q_proj` in a "
    "packed `qkv_proj`",
    "pack": "siblings over one weight buffer; also the node that computes them together",
    "sibling": "one of the sites under one parent that may share an input: q, k and v",
    "node": "an operator of a graph that adds deltas: of one site, or of a pack",
    "bank": "the factors of all slots of one group, on the device",
    "slot": "an adapter's index in all banks; −1 is the base",
    "delta": "what LoRA adds to the output of a site",
    "strategy": "how a node computes its delta (docs/kernels.md)",
    "floor": "least traffic of a node with so many adapters, over the base's weights alone",
    "row": "a vector of a site's input: a token of a request",
    "graph": "what Dynamo captures of one kind of call, compiled",
    "lowering": "what turns graphs into code: `Options.lowering`",
    "pass": "a rewrite of each graph, or a step over the model before that: `lorafx.pipeline()`",
    "outline": "repeated layers that are computed by one body",
    "pinned": "an adapter that keeps its slot: `pin_adapter()`",
    "merged": "an adapter that the base weights hold: `merge()`",
    "refused": "a graph cannot serve an adapter at a site; calls that need it say why",
}


class Table(NamedTuple):
    """A table, or without columns a list."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self) -> list[str]:
        lines = text_table(self.columns, self.rows)
        return lines if any(self.columns) else lines[1:]

    def html(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"


class Report:
    """The base of reports, which are frozen dataclasses: a heading, facts, tables and notes.

    `str()` is text, `json()` has the fields, and notebooks show unstyled tables, readable in light
    and dark themes.
    """

    @property
    def heading(self) -> str:
        raise NotImplementedError

    def facts(self) -> Iterable[str]:
        """Lines below the heading."""
        return ()

    def tables(self) -> Sequence[Table]:
        return ()

    def notes_as_lines(self) -> Iterable[str]:
        """Lines at the end."""
        return ()

    def derived(self) -> Mapping[str, Any]:
        """Additional or overriding values of `json()`."""
        return {}

    def json(self) -> dict[str, Any]:
        """The fields as JSON types; null for non-finite numbers."""
        found: dict[str, Any] = json_values({**asdict(self), **self.derived()})  # type: ignore[call-overload]
        return found

    def __str__(self) -> str:
        lines = [self.heading, *(f"  {line}" for line in self.facts())]
        for table in self.tables():
            lines += [table.title] if table.title else []
            lines += (f"  {line}" for line in table.text())
        return "\n".join([*lines, *(f"  {line}" for line in self.notes_as_lines())])

    def _repr_html_(self) -> str:
        tables = (
            _details(f"{table.title or self.heading}", table.html()) if table.rows else ""
            for table in self.tables()
        )
        told = [*self.facts(), *self.notes_as_lines()]
        lines = "".join(f"<li>{escape(line)}</li>" for line in told)
        return f"<div><b>{escape(self.heading)}</b><ul>{lines}</ul>{''.join(tables)}</div>"

    def glossary(self) -> str:
        """A line for each known word in the report, singular or plural."""
        report = str(self)
        used = {
            word: meaning
            for word, meaning in WORDS.items()
            if re.search(rf"\b{word}(e?s)?\b", report, re.IGNORECASE)
        }
        width = max(map(len, used), default=0)
        return "\n".join(f"{word:<{width}}  {meaning}" for word, meaning in used.items())


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def json_values(value: Any) -> Any:
    """`value` with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return value


def text_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Aligned lines of cells, numbers to the right; empty without rows."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return []
    lines = [list(columns), *cells]
    widths = [max(len(row[i]) for row in lines) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in lines
    ]


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell.lstrip("+-")[:1].isdigit()


def size(count: float, unit: str = "B") -> str:
    """Bytes, or another unit, with the prefix that leaves at least 1, by powers of 1000."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.1f} {prefix}{unit}" if prefix else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} T{unit}"


def over(ratio: float | None) -> str:
    """A ratio's excess over 1 in percent, or "-"."""
    return "-" if ratio is None else f"{(ratio - 1) * 100:+.1f} %"
