"""`lorafx serve`, whose options are the fields of the server's `Settings`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

import typer

#: What vLLM calls the options of these fields.
ALSO: Mapping[str, str] = {
    "name": "--served-model-name",
    "max_adapters": "--max-loras",
    "max_rank": "--max-lora-rank",
    "page_size": "--block-size",
    "max_batch_tokens": "--max-num-batched-tokens",
    "log_level": "--uvicorn-log-level",
}
#: Switches with an opposite, such as --no-allow-runtime-loading.
OPPOSED = ("allow_runtime_loading",)


def serve(**given: Any) -> None:
    """Serve MODEL, a folder or a name on the hub, and its adapters over HTTP, in OpenAI's form.

    Example: lorafx serve meta-llama/Llama-3.2-1B --adapters ./adapters
    """
    values = {option: value for option, value in given.items() if value is not None}
    from lorafx.progress import progress

    with progress("importing torch and the server"):
        from lorafx.integrations.server import check_requirements

        check_requirements()
        from lorafx.integrations.server.run import run
        from lorafx.integrations.server.settings import Settings
    names = values.pop("name", [None])
    run(Settings(**values, name=names[0], aliases=tuple(names[1:])))


def _parameters() -> Iterator[inspect.Parameter]:
    """Of `serve`, as typer reads them; none where packages of the server are missing."""
    try:
        from lorafx.integrations.server.settings import Settings, option
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lorafx":
            raise
        return
    for name, field in Settings.model_fields.items():
        if name == "aliases":  # further names
            continue
        words = (option(name), ALSO[name]) if name in ALSO else (option(name),)
        default = None if field.is_required() or field.default == () else field.default
        if name in OPPOSED:
            words = (f"{option(name)}/--no{option(name)[1:]}",)
        variable = "LORAFX_API_KEY" if name == "api_key" else None
        about = typer.Option(*words, envvar=variable, help=field.description)
        if field.is_required():
            default, about = inspect.Parameter.empty, typer.Argument()
        kind: Any = list[str] | None if name == "name" else _plain(field.annotation)
        where = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(name, where, default=default, annotation=Annotated[kind, about])


def _plain(kind: Any) -> Any:
    """A field's type as typer knows it: what is checked is `Settings`' concern."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return list[str] | None
    if all(isinstance(part, str) for part in parts or (None,)):  # a Literal
        return str
    if type(None) in parts:
        (own,) = (part for part in parts if part is not type(None))
        return _plain(own) | None
    return kind


_made = {parameter.name: parameter for parameter in _parameters()}
serve.__signature__ = inspect.Signature([*_made.values()])  # type: ignore[attr-defined]
serve.__annotations__ = {name: parameter.annotation for name, parameter in _made.items()}
#: Where packages are missing any options are taken, and the command says what is missing.
CONTEXT = {} if _made else {"allow_extra_args": True, "ignore_unknown_options": True}
