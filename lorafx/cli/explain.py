"""`lorafx explain`: what lorafx would make of a model, and which adapters fit, without weights."""

from __future__ import annotations

import textwrap
import warnings
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from lorafx.cli.arguments import Targets, as_option, target_modules
from lorafx.cli.output import AsJson, lines, show_json


@dataclass(frozen=True)
class Fit:
    """Whether an adapter fits.

    Attributes:
        adapter: its name.
        fits: whether it can be loaded.
        rank, modules: its largest rank, and how many modules it changes.
        notes: warnings.
        problem: why it does not fit.
    """

    adapter: str
    fits: bool
    rank: int = 0
    modules: int = 0
    notes: tuple[str, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        if not self.fits:
            return f"{self.adapter} does not fit: {self.problem}"
        return "\n  ".join(
            (f"{self.adapter} fits: rank {self.rank}, {self.modules} modules", *self.notes)
        )


def explain(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a hub name.")],
    target: Targets = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Does this adapter fit? May be given several times.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="16, or the largest of --adapter.")] = None,
    slot_rank: Annotated[
        int | None, typer.Option(help="Rank of a slot; larger ones take several.")
    ] = None,
    max_adapters: Annotated[int, typer.Option(help="How many may be in one batch.")] = 8,
    dtype: Annotated[
        str | None, typer.Option(help="As torch names it; what the configuration says.")
    ] = None,
    glossary: Annotated[
        bool, typer.Option("--glossary", help="Also what the words of the report mean.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the sites, packs and banks that lorafx would give MODEL, what they cost, and whether
    adapters fit.

    Nothing but the configuration of the model is read, and the adapters. Exits with 1 where one
    does not fit.

    Example: lorafx explain meta-llama/Llama-3.2-1B --adapter ./adapters/sql
    """
    import lorafx
    from lorafx.cli.models import adapters_in, on_meta
    from lorafx.prepare.configuration import request_of
    from lorafx.reports.prediction import Prediction

    module, sources = on_meta(model, dtype), adapters_in(adapter or [])
    asked = target_modules(target, sources)
    fits = [_fit(module, name, sources[name], asked, max_rank) for name in sources]
    rank = max_rank or max([16, *(fit.rank for fit in fits)])
    fitting = {fit.adapter: sources[fit.adapter] for fit in fits if fit.fits}
    config = lorafx.LoraConfig(
        target_modules=asked, max_rank=rank, slot_rank=slot_rank, max_adapters=max_adapters
    )
    config = request_of(config, fitting, module).config
    report = lorafx.explain(module, config)
    if as_json:
        told = [asdict(fit) for fit in fits]
        assert isinstance(report, Prediction)  # nobody has marked the model
        show_json({"model": model, "adapters": told, "report": report.json()})
    else:
        lines([*map(str, fits), str(report)])
        if glossary:
            lines(["words", textwrap.indent(report.glossary(), "  ")])
    if not all(fit.fits for fit in fits):
        raise typer.Exit(1)


def _fit(module: Any, name: str, source: str, target: Any, max_rank: int | None) -> Fit:
    from lorafx.adapter_store.peft_reader import read_adapter
    from lorafx.config import LoraConfig
    from lorafx.errors import LorafxError, LorafxWarning
    from lorafx.prepare.configuration import request_of
    from lorafx.prepare.marking import build_sites

    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", LorafxWarning)
            request = request_of(LoraConfig(target_modules=target), {name: source}, module)
            _, sites = build_sites(module, request.config)
            found = read_adapter(
                request.adapters[name],
                name,
                sites,
                model=module,
                lora_config=request.config,
                max_rank=max_rank,
            )
    except LorafxError as error:
        return Fit(name, False, problem=error.spelled(as_option))
    notes = [str(one.message) for one in seen if issubclass(one.category, LorafxWarning)]
    return Fit(name, True, found.rank, len(found.weights), tuple(notes))
