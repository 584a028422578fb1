"""The command `lorafx`: look at adapters, and at what lorafx would make of a model.

    lorafx inspect ADAPTER [--model M]  what an adapter holds, in which dialect, and what is refused
    lorafx explain MODEL [--target T]   sites and banks of a Hugging Face model, on the meta device
    lorafx cache list | clear           graphs that Options(cache=...) has saved
    lorafx serve MODEL --adapters F     an HTTP server in OpenAI's form (docs/serving.md)

Needs the extra `cli` (typer, rich); `explain` also needs `hf`, and `serve` needs `serve`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from lorafx import __version__
from lorafx.errors import LorafxError


def inspect(
    adapter: str,
    dialect: Annotated[str | None, "peft, diffusers, kohya, mlx or loralib"] = None,
    model: Annotated[str | None, "folder with a config.json; shows what it would refuse"] = None,
) -> None:
    """Show what ADAPTER, a folder, a file or a name on the hub, holds, and why it is refused."""
    from rich.console import Console
    from rich.table import Table

    from lorafx.adapter_store.inspecting import inspected
    from lorafx.adapter_store.saved import AdapterSource

    source = AdapterSource(adapter, dialect=dialect)
    found = inspected(source)
    console = Console(soft_wrap=True)
    if found.modules:
        table = Table("module", "in", "out", "rank", "scale", title=adapter)
        for row in found.modules:
            scale = "?" if row.scale is None else f"{row.scale:g}"
            table.add_row(row.path, *(str(size or "?") for size in row.sizes), scale)
        console.print(table)
    for line in found.lines():
        console.print(line, markup=False, highlight=False)
    if not found.refusal and model is not None:
        _check_on(model, source)
        console.print(f"nothing is refused on {model}", markup=False, highlight=False)
    if found.refusal:
        raise SystemExit(1)


def _check_on(model: str, source: Any) -> None:
    """Read an adapter for MODEL, without its weights."""
    from lorafx.adapter_store.peft_reader import read_adapter
    from lorafx.prepare.configuration import request_of
    from lorafx.prepare.marking import build_sites

    module = _on_meta(model)
    config = request_of({"adapter": source}, {}, module).config
    _, sites = build_sites(module, config)
    read_adapter(source, "adapter", sites, model=module, lora_config=config)


def _on_meta(model: str) -> Any:
    """The model that a folder's config.json describes, without numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def explain(
    model: str,
    target: Annotated[list[str] | None, "module names, suffixes or all-linear"] = None,
    max_rank: int = 16,
    max_adapters: int = 8,
) -> None:
    """Show the sites and banks that lorafx would give MODEL, a folder with a config.json."""
    import lorafx

    targets = "all-linear" if not target or target == ["all-linear"] else target
    config = lorafx.LoraConfig(target_modules=targets, max_rank=max_rank, max_adapters=max_adapters)
    print(lorafx.explain(_on_meta(model), config))


def serve(
    model: str,
    adapters: Annotated[Path | None, "folder of adapter folders, or one adapter's"] = None,
    name: Annotated[str | None, "what requests call the base model"] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_adapters: int = 8,
    max_rank: int | None = None,
    target: Annotated[list[str] | None, "module names, suffixes or all-linear"] = None,
    dtype: str | None = None,
    device: str | None = None,
    page_size: int | None = None,
    num_blocks: int | None = None,
    max_batch_tokens: int | None = None,
    max_memory_percent: float | None = None,
    temperature: float | None = None,
    lowering: str = "auto",
    cache: str | None = None,
    allow_runtime_loading: bool = False,
    adapter_root: Path | None = None,
    drain: Annotated[int | None, "seconds"] = None,
) -> None:
    """Serve MODEL, a folder or a name on the hub, and its adapters over HTTP, in OpenAI's form."""
    given = dict(locals())
    from lorafx.server.requirements import check_requirements

    check_requirements()
    from lorafx.server.run import run
    from lorafx.server.settings import Settings

    run(Settings(**{**given, "target": tuple(target or ())}))


Folder = Annotated[Path | None, "the folder; without it the one of Options(cache=True)"]


def list_saved(folder: Folder = None) -> None:
    """Show the graphs that are saved in FOLDER."""
    from rich.console import Console
    from rich.table import Table

    from lorafx.saved_graphs.folder import default_folder, entries

    home = folder or default_folder()
    found = list(entries(home))
    size = sum(entry.bytes for entry in found)
    table = Table("file", "model", "graph", "bytes", "age", title=f"{home}: {size} bytes")
    for entry in found:
        name = str(entry.path.relative_to(home))
        table.add_row(name, entry.model, entry.title, str(entry.bytes), _age(entry.age))
    Console().print(table)


def clear_saved(
    folder: Folder = None,
    older_than: Annotated[float, "days since a graph was saved or loaded last"] = 0.0,
) -> None:
    """Remove the graphs that are saved in FOLDER."""
    from lorafx.saved_graphs.folder import clear, default_folder

    home = folder or default_folder()
    print(f"{clear(home, older_than * _DAY)} graphs removed from {home}")


_DAY = 24 * 3600.0


def _age(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.0f} days"


def _root(version: Annotated[bool, "show the version and end"] = False) -> None:
    """LoRA inference, fast and correct, for any PyTorch model."""
    if version:
        print(f"lorafx {__version__}")
        raise SystemExit(0)


def main() -> None:
    """Entry point of the command."""
    try:
        import typer
    except ImportError:
        sys.exit("the lorafx command needs typer and rich: pip install 'lorafx[cli]'")
    app = typer.Typer(add_completion=False, no_args_is_help=True)
    app.callback(invoke_without_command=True)(_root)
    app.command()(inspect)
    app.command()(explain)
    app.command()(serve)
    cache = typer.Typer(no_args_is_help=True, help="Graphs that Options(cache=...) has saved.")
    cache.command("list")(list_saved)
    cache.command("clear")(clear_saved)
    app.add_typer(cache, name="cache")
    try:
        app(standalone_mode=False)
    except LorafxError as error:
        sys.exit(f"lorafx: {error}")
