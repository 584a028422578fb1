"""The command `lorafx`: look at adapters, and at what lorafx would make of a model.

    lorafx inspect ADAPTER              modules, ranks and scales of a PEFT adapter folder
    lorafx explain MODEL [--target T]   sites and banks of a Hugging Face model, on the meta device

Needs the extra `cli` (typer, rich); `explain` also needs `hf`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from lorafx.errors import LorafxError


def inspect(adapter: Path) -> None:
    """Show what the adapter in folder ADAPTER contains."""
    from rich.console import Console
    from rich.table import Table

    from lorafx.adapter_store.checkpoint import load_state
    from lorafx.adapter_store.peft_keys import parse, without_prefix

    state = load_state(adapter)
    table = Table("module", "in", "out", "rank", "scale", title=str(adapter))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    others = []
    for key, tensor in state.tensors.items():
        factor = parse(key)
        if factor is None:
            others.append(key)
        else:
            shapes.setdefault(without_prefix(factor.module), {})[factor.letter] = tuple(
                tensor.shape
            )
    for module, factors in sorted(shapes.items()):
        a, b = factors.get("A", ()), factors.get("B", ())
        rank = a[0] if a else 0
        cells = (a[1] if len(a) > 1 else "?", b[0] if b else "?", rank)
        scale = f"{state.config.scale(module, rank):g}" if rank else "?"
        table.add_row(module, *map(str, cells), scale)
    console = Console()
    console.print(table)
    for key in others:
        console.print(f"not a LoRA factor: {key}")


def explain(
    model: str,
    target: Annotated[list[str] | None, "module names, suffixes or all-linear"] = None,
    max_rank: int = 16,
    max_adapters: int = 8,
) -> None:
    """Show the sites and banks that lorafx would give MODEL, a folder with a config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import lorafx

    targets = "all-linear" if not target or target == ["all-linear"] else target
    config = lorafx.LoraConfig(target_modules=targets, max_rank=max_rank, max_adapters=max_adapters)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    print(lorafx.explain(module, config))


def main() -> None:
    """Entry point of the command."""
    try:
        import typer
    except ImportError:
        sys.exit("the lorafx command needs typer and rich: pip install 'lorafx[cli]'")
    app = typer.Typer(add_completion=False, no_args_is_help=True)
    app.command()(inspect)
    app.command()(explain)
    try:
        app(standalone_mode=False)
    except LorafxError as error:
        sys.exit(f"lorafx: {error}")
