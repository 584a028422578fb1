"""Arguments and options that several commands have, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lorafx.errors import Setting

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


def as_option(setting: Setting) -> str:
    """What commands say where a message names a setting."""
    option = _OPTIONS.get(setting.name)
    if option is None:
        return setting.text
    return option if setting.value is None else f"give {option} {setting.value}"


def target_modules(given: Sequence[str] | None, adapters: Any) -> Any:
    """`LoraConfig.target_modules` for `--target`: without it what the adapters say, and without
    both every linear layer."""
    if given and given != ["all-linear"]:
        return given
    return None if adapters and not given else "all-linear"
