"""`lorafx profile`: where the time of a call goes, site by site."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafx.cli.arguments import Adapters, Dtype, LanguageModel, LoweringOption
from lorafx.cli.output import AsJson, lines, show_json


def profile(
    model: LanguageModel,
    adapters: Adapters,
    batch: Annotated[int, typer.Option(help="Requests of the batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a request.")] = 16,
    calls: Annotated[int, typer.Option(help="Calls that are measured.")] = 10,
    dtype: Dtype = None,
    lowering: LoweringOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the base's product and the delta of each site, beside the byte floor.

    Requests take turns with the adapters.

    Example: lorafx profile meta-llama/Llama-3.2-1B --adapters ./adapters --batch 8
    """
    import lorafx
    from lorafx.cli.models import adapters_in, loaded
    from lorafx.errors import ConfigError
    from lorafx.serving.example_inputs import derived_example

    if min(batch, length) < 1:
        raise ConfigError("--batch and --length must be positive")
    sources = adapters_in(adapters)
    module = loaded(model, dtype)
    names = [list(sources)[row % len(sources)] for row in range(batch)]
    inputs = derived_example(module, module.device, batch, length).named
    compiled = lorafx.compile(module, dict(sources), options={"lowering": lowering})
    found = compiled.profile(inputs, names, calls=calls)
    if as_json:
        show_json(found.json())
    else:
        lines([str(found)])
