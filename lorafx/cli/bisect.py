"""`lorafx bisect`: whether a model answers as its adapters merged into it do, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafx.cli.arguments import Adapters, Dtype, LanguageModel, LoweringOption
from lorafx.cli.output import AsJson, lines, show_json


def bisect(
    model: LanguageModel,
    adapters: Adapters,
    folder: Annotated[
        Path | None, typer.Option(help="Where a program that shows a difference is written.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a request.")] = 16,
    dtype: Dtype = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error; by dtype where not given.")
    ] = None,
    lowering: LoweringOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare a batch of all adapters and the base with each adapter merged into MODEL's weights.

    Where they differ, say after which pass first, and at which site. Exits with 1 then.

    Example: lorafx bisect meta-llama/Llama-3.2-1B --adapters ./adapters --folder ./difference
    """
    import lorafx
    from lorafx.cli.models import adapters_in, loaded
    from lorafx.errors import ConfigError
    from lorafx.serving.example_inputs import derived_example

    if length < 1:
        raise ConfigError("--length must be positive")
    sources = adapters_in(adapters)
    module = loaded(model, dtype)
    names: list[str | None] = [*sources, None]
    inputs: dict[str, Any] = dict(derived_example(module, module.device, len(names), length).named)
    compiled = lorafx.compile(module, dict(sources), options={"lowering": lowering})
    found = lorafx.bisect(compiled, inputs, names, tolerance=tolerance, folder=folder)
    if as_json:
        show_json({"model": model, "adapters": list(sources), **found.json()})
    else:
        lines([str(found)])
    if found.first is not None:
        raise typer.Exit(1)
