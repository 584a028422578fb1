"""`lorafx serve`: an HTTP server in OpenAI's form (lorafx.integrations.server)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafx.integrations.cli.options import SlotRank, Targets


def serve(
    model: str,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapter folders, or one adapter's.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the base model.")] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_adapters: int = 8,
    max_rank: int | None = None,
    slot_rank: SlotRank = None,
    max_host_bytes: Annotated[
        int | None, typer.Option(help="Host memory that adapters may take.")
    ] = None,
    target: Targets = None,
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
) -> None:
    """Serve MODEL, a folder or a name on the hub, and its adapters over HTTP, in OpenAI's form.

    Example: lorafx serve meta-llama/Llama-3.2-1B --adapters ./adapters
    """
    given = dict(locals())
    from lorafx.progress import progress

    with progress("importing torch and the server"):
        from lorafx.integrations.server import check_requirements

        check_requirements()
        from lorafx.integrations.server.run import run
        from lorafx.integrations.server.settings import Settings
    run(Settings(**{**given, "target": tuple(target or ())}))
