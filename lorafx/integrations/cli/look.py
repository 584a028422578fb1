"""`lorafx explain`, which needs no weights of the model; `lorafx profile` and `bisect`, which run
it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from lorafx.integrations.cli.options import (
    Adapters,
    AsJson,
    ConfiguredModel,
    Dtype,
    LanguageModel,
    LoweringOption,
    SlotRank,
    Targets,
    adapters_in,
    as_option,
    loaded,
    on_meta,
    read_for,
    show,
    show_json,
    target_modules,
)


def explain(
    model: ConfiguredModel,
    target: Targets = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Does this adapter fit? May be given several times.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="16, or the largest of --adapter.")] = None,
    slot_rank: SlotRank = None,
    max_adapters: Annotated[int, typer.Option(help="How many may be in one batch.")] = 8,
    dtype: Annotated[
        str | None, typer.Option(help="As torch names it; what the configuration says.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the sites and banks that lorafx would give MODEL, their bytes, and whether adapters fit.

    Only the configuration of the model and the adapters are read. Exits with 1 if an adapter does
    not fit.

    Example: lorafx explain meta-llama/Llama-3.2-1B --adapter ./adapters/sql
    """
    import lorafx
    from lorafx.runtime.marking import request_of

    module, sources = on_meta(model, dtype), adapters_in(adapter or [])
    targets = target_modules(target, sources)
    fits = [_fit(module, name, sources[name], targets, max_rank) for name in sources]
    rank = max_rank or max([16, *(fit["rank"] for fit in fits)])
    fitting = {fit["adapter"]: sources[fit["adapter"]] for fit in fits if fit["fits"]}
    config = lorafx.LoraConfig(
        target_modules=targets, max_rank=rank, slot_rank=slot_rank, max_adapters=max_adapters
    )
    report = lorafx.explain(module, request_of(config, fitting, module).config)
    if as_json:
        show_json({"model": model, "adapters": fits, "report": report.json()})
    else:
        print(*map(_fit_in_words, fits), report, sep="\n")
    if len(fitting) < len(fits):
        raise typer.Exit(1)


def _fit(module: Any, name: str, source: str, target: Any, max_rank: int | None) -> dict[str, Any]:
    """Whether an adapter can be loaded, its largest rank, the number of modules that it changes,
    and warnings; or the problem, if it cannot."""
    from lorafx.errors import LorafxError, LorafxWarning, respelled

    fit = {"adapter": name, "fits": False, "rank": 0, "modules": 0, "notes": [], "problem": ""}
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", LorafxWarning)
            adapter = read_for(module, name, source, target, max_rank)
    except LorafxError as error:
        return {**fit, "problem": respelled(error, as_option)}
    notes = [str(note.message) for note in seen if issubclass(note.category, LorafxWarning)]
    modules = len({*adapter.weights, *adapter.extras["own"]})
    return {**fit, "fits": True, "rank": adapter.rank, "modules": modules, "notes": notes}


def _fit_in_words(fit: Mapping[str, Any]) -> str:
    if not fit["fits"]:
        return f"{fit['adapter']} does not fit: {fit['problem']}"
    fits = f"{fit['adapter']} fits: rank {fit['rank']}, {fit['modules']} modules"
    return "\n  ".join((fits, *fit["notes"]))


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
    compiled, inputs, names = _compiled(model, adapters, batch, length, dtype, lowering)
    turns = [names[row % len(names)] for row in range(batch)]
    show(compiled.profile(inputs, turns, calls=calls), as_json)


def bisect(
    model: LanguageModel,
    adapters: Adapters,
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

    Example: lorafx bisect meta-llama/Llama-3.2-1B --adapters ./adapters
    """
    import lorafx

    compiled, inputs, names = _compiled(model, adapters, None, length, dtype, lowering)
    bisection = lorafx.bisect(compiled, inputs, [*names, None], tolerance=tolerance)
    show(bisection, as_json, model=model, adapters=names)
    if bisection.first is not None:
        raise typer.Exit(1)


def _compiled(
    model: str,
    adapters: Sequence[str],
    batch: int | None,
    length: int,
    dtype: str | None,
    lowering: str,
) -> tuple[Any, dict[str, Any], list[str]]:
    """The compiled model, example inputs with `batch` rows, and the names of its adapters. If
    `batch` is None, there is a row for each adapter and one for the base."""
    import lorafx
    from lorafx.errors import ConfigError
    from lorafx.runtime.example_inputs import derived_example

    if length < 1 or (batch is not None and batch < 1):
        raise ConfigError("--batch and --length must be positive")
    sources = adapters_in(adapters)
    module = loaded(model, dtype)
    rows = len(sources) + 1 if batch is None else batch
    inputs = dict(derived_example(module, module.device, rows, length).named)
    compiled = lorafx.compile(
        module, dict(sources), options={"lowering": lowering, "start": "compiled"}
    )
    return compiled, inputs, list(sources)
