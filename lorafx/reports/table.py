"""Tables as text and as HTML, sizes and ratios as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

TableRow = Sequence[object]


def text_table(columns: Sequence[str], rows: Iterable[TableRow]) -> list[str]:
    """Lines with the cells of each column below one another; numbers end where their column does.

    Empty without rows.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return []
    every = [list(columns), *cells]
    widths = [max(len(row[i]) for row in every) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in every
    ]


def html_table(title: str, columns: Sequence[str], rows: Iterable[TableRow]) -> str:
    """A table with a caption."""
    return f"<table><caption>{escape(title)}</caption>{html_rows(columns, rows)}</table>"


def html_rows(columns: Sequence[str], rows: Iterable[TableRow]) -> str:
    """The rows of a table, those of `columns` first."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<tr>{head}</tr>{body}"


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1, by powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def over(ratio: float | None) -> str:
    """By how much a ratio is over 1, in percent; "-" where there is none."""
    return "-" if ratio is None else f"{(ratio - 1) * 100:+.1f} %"


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell.lstrip("+-")[:1].isdigit()
