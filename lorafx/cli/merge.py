"""`lorafx merge`: an adapter into its base, as a model of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lorafx.cli.options import AdapterArgument, AsJson, Dtype, show_json


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
    from lorafx.adapter_store.peft_writer import refuse_full
    from lorafx.cli.models import loaded
    from lorafx.prepare.configuration import request_of

    refuse_full(folder)
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

    from lorafx.base_weights.export_merged import FILE
    from lorafx.cli.models import loaded

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
