"""The commands. Nothing here imports torch: `lorafx --help` is there at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorafx import __version__
from lorafx.integrations.cli.adapters import inspect, merge
from lorafx.integrations.cli.bench import bench
from lorafx.integrations.cli.diagnosis import doctor
from lorafx.integrations.cli.look import bisect, explain, profile
from lorafx.integrations.cli.serve import serve

#: Errors of lorafx are one line; others are faults, whose traceback is Python's own.
_PLAIN: Any = {"pretty_exceptions_enable": False}

app = typer.Typer(
    **_PLAIN,
    epilog="Exit codes: 0 done, 1 refused (the message says why), 2 wrong usage, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """LoRA inference, fast and correct, for any PyTorch model."""
    if version:
        print(f"lorafx {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


for command in (inspect, explain, merge, bench, bisect, profile, serve, doctor):
    app.command()(command)
