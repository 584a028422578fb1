"""Reports: values with a text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from lorafx.errors import ConfigError


class Report:
    """The base class of reports, which are frozen dataclasses with a heading, facts, a table and
    notes. `str()` is their text, which notebooks show too; `json()` has the fields."""

    @property
    def heading(self) -> str:
        raise NotImplementedError

    def facts(self) -> Iterable[str]:
        """Lines below the heading."""
        return ()

    def table(self) -> Iterable[str]:
        return ()

    def notes_as_lines(self) -> Iterable[str]:
        """Lines at the end."""
        return ()

    def derived(self) -> Mapping[str, Any]:
        """Additional or overriding values of `json()`."""
        return {}

    def json(self) -> dict[str, Any]:
        """The fields as JSON types; null for non-finite numbers."""
        values: dict[str, Any] = json_values({**asdict(self), **self.derived()})  # type: ignore[call-overload]
        return values

    def __str__(self) -> str:
        lines = (*self.facts(), *self.table(), *self.notes_as_lines())
        return "\n".join([self.heading, *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


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


@contextmanager
def written_into(folder: Path) -> Iterator[None]:
    """Create the folder. Inside the block an OSError is raised as a ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error}. Name a folder that you may write to, or one "
            "that does not exist yet"
        ) from error
