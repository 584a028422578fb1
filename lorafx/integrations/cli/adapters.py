"""`lorafx inspect` and `merge`: an adapter by itself, and in its base."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from lorafx.integrations.cli.options import AdapterArgument, AsJson, Dtype, show_json, show_table

DialectOption = Annotated[
    str | None, typer.Option(help="peft, diffusers, kohya, mlx or loralib; told by the keys.")
]


def inspect(
    adapter: AdapterArgument,
    dialect: DialectOption = None,
    model: Annotated[
        str | None, typer.Option(help="Folder with a config.json; shows what it would refuse.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what ADAPTER holds, in which dialect, or why it is refused.

    Example: lorafx inspect style.safetensors --model ./unet
    """
    from lorafx.adapter_store.checkpoint import inspected
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.integrations.cli.models import on_meta, read_for

    source = AdapterSource(adapter, dialect=dialect)
    found = inspected(source)
    if model is not None:
        read_for(on_meta(model), "adapter", source)
    if as_json:
        show_json(asdict(found))
    else:
        rows = [
            (row.path, *(size or "?" for size in row.sizes), _scale(row.scale))
            for row in found.modules
        ]
        if rows:
            show_table(adapter, ("module", "in", "out", "rank", "scale"), rows)
        print(*found.lines(), sep="\n")
        if model is not None:
            print(f"nothing is refused on {model}")


def _scale(scale: float | None) -> str:
    return "?" if scale is None else f"{scale:g}"


def merge(
    model: Annotated[str, typer.Argument(help="A folder with a model, or a name on the hub.")],
    adapter: AdapterArgument,
    folder: Annotated[Path, typer.Argument(help="Where to save the model; it must not exist.")],
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Save MODEL with ADAPTER merged into its weights, for `from_pretrained`, and its tokenizer.

    Example: lorafx merge meta-llama/Llama-3.2-1B ./adapters/sql ./llama-sql
    """
    import lorafx
    from lorafx.errors import ConfigError
    from lorafx.integrations.cli.models import loaded
    from lorafx.runtime.marking import request_of

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name a folder that does not exist yet")
    module = loaded(model, dtype)
    request = request_of({"adapter": adapter}, {}, module)
    config = replace(request.config, max_adapters=1)
    compiled = lorafx.compile(
        module, config, adapters=request.adapters, options={"lowering": "reference"}
    )
    compiled.export_merged("adapter", folder, max_shard_size=max_shard_size)
    if not (folder / "config.json").exists() and hasattr(module, "save_pretrained"):
        _save_anew(model, dtype, folder)
    tokenizer = _save_tokenizer(model, folder)
    if as_json:
        show_json({"folder": str(folder), "tokenizer": tokenizer})
    else:
        print(f"{adapter} merged into {model}: {folder}" + ("" if tokenizer else ", no tokenizer"))


def _save_anew(model: str, dtype: str | None, folder: Path) -> None:
    """Have the model's class save what was written into `folder`: diffusers' classes take no
    weights to save but their own."""
    from safetensors.torch import load_file

    from lorafx.integrations.cli.models import loaded
    from lorafx.weights.export_merged import FILE

    made = loaded(model, dtype)
    made.load_state_dict(load_file(folder / FILE))
    (folder / FILE).unlink()
    made.save_pretrained(str(folder))


def _save_tokenizer(model: str, folder: Path) -> bool:
    """Save that of `model` beside the merged one; whether there is one."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(model).save_pretrained(str(folder))
    except (OSError, ValueError, KeyError):  # models of images have none
        return False
    return True
