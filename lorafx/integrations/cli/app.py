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
    SlotRank,
    Targets,
    loaded,
    on_meta,
    read_for,
    show_json,
    show_table,
)
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


def serve(
    model: str,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapter folders, or one adapter's.")
    ] = None,
    lora_modules: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER.")] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", "--served-model-name", help="What requests call the base model."),
    ] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_adapters: Annotated[int, typer.Option("--max-adapters", "--max-loras")] = 8,
    max_rank: Annotated[int | None, typer.Option("--max-rank", "--max-lora-rank")] = None,
    slot_rank: SlotRank = None,
    max_host_bytes: Annotated[
        int | None, typer.Option(help="Host memory that adapters may take.")
    ] = None,
    target: Targets = None,
    dtype: str | None = None,
    device: str | None = None,
    page_size: Annotated[int | None, typer.Option("--page-size", "--block-size")] = None,
    num_blocks: int | None = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option("--max-batch-tokens", "--max-num-batched-tokens")
    ] = None,
    max_num_seqs: int | None = None,
    max_memory_percent: float | None = None,
    max_model_len: int | None = None,
    max_logprobs: Annotated[
        int, typer.Option(help="Likeliest tokens that a request may ask for; -1 for all.")
    ] = 20,
    max_fields: Annotated[int, typer.Option(help="The most fields of a request.")] = 128,
    max_items: Annotated[
        int, typer.Option(help="The most entries of a field that is a list or an object.")
    ] = 1024,
    max_field_size: Annotated[
        int, typer.Option(help="The most letters and entries of a field, but of prompts.")
    ] = 1 << 17,
    max_queue: Annotated[
        int, typer.Option(help="Sequences under way; further requests get 429.")
    ] = 1024,
    max_body_bytes: int = 8 << 20,
    runner: Annotated[
        str, typer.Option(help="generate, pooling, or auto: as the files say.")
    ] = "auto",
    pooling: Annotated[str | None, typer.Option(help="Encoders: mean, cls, last, max.")] = None,
    batch_window: Annotated[float, typer.Option(help="Encoders: ms to wait for company.")] = 2,
    temperature: float | None = None,
    chat_template: Annotated[str | None, typer.Option(help="A file, or a template.")] = None,
    lowering: str = "auto",
    cache: str | None = "auto",
    warmup: Annotated[
        bool, typer.Option("--warmup", help="Take requests when all graphs are compiled.")
    ] = False,
    allow_control: Annotated[
        bool, typer.Option("--allow-control", help="Let clients pause, and send weights.")
    ] = False,
    max_upload_bytes: int = 1 << 30,
    allow_runtime_loading: bool = False,
    resolve_adapters: Annotated[
        bool, typer.Option("--resolve-adapters", help="Load adapters when they are asked for.")
    ] = False,
    max_adapter_reads: int = 2,
    adapter_root: Path | None = None,
    drain: Annotated[
        int | None, typer.Option(help="Seconds to wait for answers under way when it is stopped.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LORAFX_API_KEY",
            help="Key that requests have to come with. Others can see it "
            "in the list of processes: prefer the variable.",
        ),
    ] = None,
    allowed_origins: list[str] | None = None,
    ssl_keyfile: Path | None = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve HTTPS with it.")] = None,
    ssl_ca_certs: Path | None = None,
    ssl_cert_reqs: int = 0,
    ssl_ciphers: str | None = None,
    log_level: Annotated[str, typer.Option("--log-level", "--uvicorn-log-level")] = "info",
) -> None:
    """Serve MODEL, a folder or a name on the hub, and its adapters over HTTP, in OpenAI's form.

    Example: lorafx serve meta-llama/Llama-3.2-1B --adapters ./adapters
    """
    values = {option: value for option, value in locals().items() if value is not None}
    from lorafx.progress import progress

    with progress("importing torch and the server"):
        from lorafx.integrations.server import check_requirements

        check_requirements()
        from lorafx.integrations.server.run import run
        from lorafx.integrations.server.settings import Settings
    names = values.pop("name", [None])
    run(Settings(**values, name=names[0], aliases=tuple(names[1:])))


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
app.command(cls=ServeCommand)(serve)
