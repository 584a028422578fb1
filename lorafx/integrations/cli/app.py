"""The commands. This module does not import torch, so that `lorafx --help` is quick."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafx import __version__
from lorafx.integrations.cli.bench import bench
from lorafx.integrations.cli.diagnosis import doctor
from lorafx.integrations.cli.look import bisect, explain, profile
from lorafx.integrations.cli.options import (
    AdapterArgument,
    AsJson,
    Dtype,
    loaded,
    on_meta,
    read_for,
    show_json,
    show_table,
)
from lorafx.integrations.cli.serving import CONTEXT, serve
from lorafx.integrations.cli.vllm_options import ServeCommand


def inspect(
    adapter: AdapterArgument,
    dialect: Annotated[
        str | None, typer.Option(help="peft, diffusers, kohya, mlx or loralib; told by the keys.")
    ] = None,
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

    source = AdapterSource(adapter, dialect=dialect)
    contents = inspected(source)
    if model is not None:
        read_for(on_meta(model), "adapter", source)
    if as_json:
        show_json(asdict(contents))
    else:
        rows = [
            (
                row.path,
                *(size or "?" for size in row.sizes),
                "?" if row.scale is None else f"{row.scale:g}",
            )
            for row in contents.modules
        ]
        if rows:
            show_table(adapter, ("module", "in", "out", "rank", "scale"), rows)
        print(*contents.lines(), sep="\n")
        if model is not None:
            print(f"nothing is refused on {model}")


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
        _save_by_class(model, dtype, folder)
    tokenizer = _save_tokenizer(model, folder)
    if as_json:
        show_json({"folder": str(folder), "tokenizer": tokenizer})
    else:
        print(f"{adapter} merged into {model}: {folder}" + ("" if tokenizer else ", no tokenizer"))


def _save_by_class(model: str, dtype: str | None, folder: Path) -> None:
    """Replace the weights in `folder` by what the model's own class saves, with its configuration.
    diffusers' classes can only save the weights of an instance."""
    from safetensors.torch import load_file

    from lorafx.weights.export_merged import FILE

    merged = loaded(model, dtype)
    merged.load_state_dict(load_file(folder / FILE))
    (folder / FILE).unlink()
    merged.save_pretrained(str(folder))


def _save_tokenizer(model: str, folder: Path) -> bool:
    """Save the tokenizer of `model` in `folder`. Returns whether the model has one."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(model).save_pretrained(str(folder))
    except (OSError, ValueError, KeyError):  # models of images have none
        return False
    return True


#: `main` prints errors of lorafx in one line; others are faults and get Python's own traceback.
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


for command in (inspect, explain, merge, bench, bisect, profile, doctor):
    app.command()(command)
app.command(cls=ServeCommand, context_settings=CONTEXT)(serve)
