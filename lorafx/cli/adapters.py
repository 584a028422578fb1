"""`lorafx inspect` and `lorafx convert`: adapters by themselves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafx.cli.options import AdapterArgument, AsJson, show_json, show_table

DialectOption = Annotated[
    str | None, typer.Option(help="peft, diffusers, kohya, mlx or loralib; told by the keys.")
]
Config = Annotated[
    Path | None, typer.Option(help="JSON file of the configuration, where none lies beside it.")
]

_SIZES = ("in", "out", "rank")


def inspect(
    adapter: AdapterArgument,
    dialect: DialectOption = None,
    model: Annotated[
        str | None, typer.Option(help="Folder with a config.json; shows what it would refuse.")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show what ADAPTER holds, in which dialect, and why it is refused.

    Exits with 1 where it is.

    Example: lorafx inspect style.safetensors --model ./unet
    """
    from lorafx.adapter_store.inspecting import inspected
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.cli.models import on_meta, read_for

    source = AdapterSource(adapter, _fields(config), dialect)
    found = inspected(source)
    fits = model is not None and not found.refusal
    if fits:
        read_for(on_meta(str(model)), "adapter", source)
    if as_json:
        show_json(asdict(found))
    else:
        rows = [
            {
                "module": row.path,
                **{name: size or "?" for name, size in zip(_SIZES, row.sizes, strict=True)},
                "scale": "?" if row.scale is None else f"{row.scale:g}",
            }
            for row in found.modules
        ]
        if rows:
            show_table(adapter, ("module", *_SIZES, "scale"), rows)
        print(*found.lines(), sep="\n")
        if fits:
            print(f"nothing is refused on {model}")
    if found.refusal:
        raise typer.Exit(1)


def _fields(config: Path | None) -> dict[str, Any] | None:
    from lorafx.adapter_store.config_values import json_object
    from lorafx.errors import ConfigError

    if config is None:
        return None
    try:
        return json_object(config.read_text(), str(config))
    except OSError as error:
        raise ConfigError(f"--config {config} cannot be read: {error}") from error


def convert(
    adapter: AdapterArgument,
    folder: Annotated[Path, typer.Argument(help="The PEFT folder to write; it must not exist.")],
    dialect: DialectOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder with a config.json; needed where names have no dots (kohya)."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Which model of a pipeline: unet, transformer, ...")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Write ADAPTER, of any dialect that lorafx reads, as a folder that PEFT loads.

    Example: lorafx convert style.safetensors ./style --model ./unet
    """
    from lorafx.adapter_store.checkpoint import load_state
    from lorafx.adapter_store.peft_writer import write_peft
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.cli.models import on_meta

    module = None if model is None else on_meta(model)
    state = load_state(AdapterSource(adapter, _fields(config), dialect, component), module)
    written = write_peft(state, folder)
    if as_json:
        show_json({"folder": str(folder), "dialect": state.dialect, "modules": len(written)})
    else:
        print(f"{state.dialect}: {len(written)} modules written to {folder}")
