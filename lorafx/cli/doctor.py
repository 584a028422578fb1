"""`lorafx doctor`: what is installed here, and whether lorafx works on it."""

from __future__ import annotations

import typer

from lorafx.cli.output import AsJson, lines, show_json


def doctor(as_json: AsJson = False) -> None:
    """Show versions, the private parts of torch that lorafx needs and those that make it faster,
    and compare a small mixed batch with each adapter merged by itself.

    Nothing is downloaded. Exits with 1 where something is wrong, and says what.

    Example: lorafx doctor
    """
    from lorafx.cli.diagnosis import diagnosed

    found = diagnosed()
    if as_json:
        show_json(found.json())
    else:
        lines([str(found)])
    if found.faults:
        raise typer.Exit(1)
