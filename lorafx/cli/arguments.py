"""Arguments and options that several commands have, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

LanguageModel = Annotated[
    str, typer.Argument(help="A folder with a language model, or a hub name.")
]
#: The option `--adapters`.
Adapters = Annotated[
    list[str], typer.Option(help="An adapter, or a folder of some; may be given several times.")
]
#: The option `--dtype`.
Dtype = Annotated[str | None, typer.Option(help="As torch names it; what the files say.")]
#: The option `--lowering`.
LoweringOption = Annotated[str, typer.Option(help="As Options.lowering.")]
#: The option `--target`.
Targets = Annotated[list[str] | None, typer.Option(help="Module names, suffixes or all-linear.")]


def target_modules(given: Sequence[str] | None, adapters: Any) -> Any:
    """`LoraConfig.target_modules` for `--target`: without it what the adapters say, and without
    both every linear layer."""
    if given and given != ["all-linear"]:
        return given
    return None if adapters and not given else "all-linear"
