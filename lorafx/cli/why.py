"""`lorafx why`: whether a module would carry LoRA, by which rule, and what an adapter has for it;
without weights of the model."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafx.cli.arguments import Targets, target_modules
from lorafx.cli.output import AsJson, lines, show_json


def why(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a hub name.")],
    path: Annotated[str, typer.Argument(help="A module: model.layers.3.mlp.gate_proj.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="What has it for the module? May be given again.")
    ] = None,
    target: Targets = None,
    as_json: AsJson = False,
) -> None:
    """Show whether the module at PATH of MODEL carries LoRA and why, and which keys of adapters are
    for it.

    Without --target the adapters say which modules are selected, and without both it is every
    linear layer. Nothing but the configuration of the model is read, and the adapters.

    Example: lorafx why meta-llama/Llama-3.2-1B model.layers.0.mlp.gate_proj --adapter ./sql
    """
    import lorafx
    from lorafx.cli.models import adapters_in, on_meta
    from lorafx.explanation.why import why_before
    from lorafx.prepare.configuration import request_of
    from lorafx.prepare.marking import build_sites

    module, sources = on_meta(model), adapters_in(adapter or [])
    request = request_of(
        lorafx.LoraConfig(target_modules=target_modules(target, sources)), sources, module
    )
    _, sites = build_sites(module, request.config)
    told = why_before(module, request.config, sites, path, sources)
    if as_json:
        show_json({"model": model, "path": path, "why": [each.json() for each in told]})
    else:
        lines(map(str, told))
