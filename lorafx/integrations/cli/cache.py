"""`lorafx cache`: the graphs that `Options(cache=...)` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafx.integrations.cli.options import AsJson, show_json, show_table

Folder = Annotated[
    Path | None,
    typer.Option(help="Where they are; without it the folder of Options(cache=True)."),
]

_DAY = 24 * 3600.0


def list_saved(folder: Folder = None, as_json: AsJson = False) -> None:
    """Show the graphs that are saved in --folder."""
    from lorafx.capture.saved_graphs.folder import default_folder, entries

    home = folder or default_folder()
    rows: list[dict[str, Any]] = [
        {
            "file": str(entry.path.relative_to(home)),
            "model": entry.model,
            "graph": entry.title,
            "bytes": entry.bytes,
            "age": entry.age,
        }
        for entry in entries(home)
    ]
    if as_json:
        show_json({"folder": str(home), "graphs": rows})
        return
    size = sum(row["bytes"] for row in rows)
    shown = [{**row, "age": _age(row["age"])} for row in rows]
    show_table(f"{home}: {size} bytes", ("file", "model", "graph", "bytes", "age"), shown)


def clear_saved(
    folder: Folder = None,
    older_than: Annotated[
        float, typer.Option(help="Days since a graph was saved or loaded last.")
    ] = 0.0,
) -> None:
    """Remove the graphs that are saved in --folder."""
    from lorafx.capture.saved_graphs.folder import clear, default_folder

    home = folder or default_folder()
    print(f"{clear(home, older_than * _DAY)} graphs removed from {home}")


def _age(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.0f} days"
