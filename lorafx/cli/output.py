"""What commands print: tables and lines for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

#: The option `--json`.
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]

#: Characters of a line of a table.
_WIDEST = 10_000


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=1, default=str))


def lines(text: Iterable[str]) -> None:
    """Print lines as they are."""
    for line in text:
        print(line)


def table(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows in columns. Nothing is cut where the terminal is narrow: lines go on below."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    made = Table(*columns, title=escape(title))
    for row in rows:
        made.add_row(*(escape(str(row[column])) for column in columns))
    Console(soft_wrap=True, width=_WIDEST).print(made)
