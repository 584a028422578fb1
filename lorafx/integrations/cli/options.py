"""Arguments and options that several commands have, and how commands print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from lorafx.inspection.report import text_table

ConfiguredModel = Annotated[str, typer.Argument(help="A folder with a config.json, or a hub name.")]
LanguageModel = Annotated[
    str, typer.Argument(help="A folder with a language model, or a hub name.")
]
AdapterArgument = Annotated[str, typer.Argument(help="A folder, a file, or a name on the hub.")]
Adapters = Annotated[
    list[str], typer.Option(help="An adapter, or a folder of some; may be given several times.")
]
Dtype = Annotated[str | None, typer.Option(help="As torch names it; what the files say.")]
LoweringOption = Annotated[str, typer.Option(help="As Options.lowering.")]
Targets = Annotated[list[str] | None, typer.Option(help="Module names, suffixes or all-linear.")]
SlotRank = Annotated[int | None, typer.Option(help="Rank of a slot; larger ones take several.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]

#: Fields of LoraConfig and Options that are options of commands, as these spell them.
_OPTIONS = {
    "cache": "--cache",
    "lowering": "--lowering",
    "max_adapters": "--max-adapters",
    "max_host_bytes": "--max-host-bytes",
    "max_rank": "--max-rank",
    "slot_rank": "--slot-rank",
    "target_modules": "--target",
}


def as_option(field: str, value: str | None, given: bool = False) -> str | None:
    """What commands say where a message names a field of LoraConfig or Options."""
    option = _OPTIONS.get(field)
    return option if option is None or value is None else f"give {option} {value}"


def target_modules(given: Sequence[str] | None, adapters: Any) -> Any:
    """`LoraConfig.target_modules` for `--target`: without it what the adapters say, and without
    both every linear layer."""
    if given and given != ["all-linear"]:
        return given
    return None if adapters and not given else "all-linear"


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=1, default=str))


def show(report: Any, as_json: bool, **more: Any) -> None:
    """Print a report, as text or as one JSON object with `more`."""
    if as_json:
        show_json({**more, **report.json()})
    else:
        print(report)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, below a title."""
    print(title, *text_table(columns, rows), sep="\n")
