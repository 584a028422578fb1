"""Arguments and options that several commands have, the models and adapters that they name, and how
commands print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafx.errors import ConfigError
from lorafx.inspection.report import text_table
from lorafx.progress import progress

ConfiguredModel = Annotated[str, typer.Argument(help="A folder with a config.json, or a hub name.")]
LanguageModel = Annotated[
    str, typer.Argument(help="A folder with a language model, or a hub name.")
]
AdapterArgument = Annotated[str, typer.Argument(help="A folder, a file, or a name on the hub.")]
Adapters = Annotated[
    list[str], typer.Option(help="An adapter, or a folder of some; may be given several times.")
]
Dtype = Annotated[str | None, typer.Option(help="As torch names it; what the files say.")]
LoweringOption = Annotated[str, typer.Option(help="As Options.lowering.")]
Targets = Annotated[list[str] | None, typer.Option(help="Module names, suffixes or all-linear.")]
SlotRank = Annotated[int | None, typer.Option(help="Rank of a slot; larger ones take several.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]

#: Fields of LoraConfig and Options that are options of commands, as these spell them.
_OPTIONS = {
    "cache": "--cache",
    "lowering": "--lowering",
    "max_adapters": "--max-adapters",
    "max_host_bytes": "--max-host-bytes",
    "max_rank": "--max-rank",
    "slot_rank": "--slot-rank",
    "target_modules": "--target",
}


def as_option(field: str, value: str | None, given: bool = False) -> str | None:
    """What commands say where a message names a field of LoraConfig or Options."""
    option = _OPTIONS.get(field)
    return option if option is None or value is None else f"give {option} {value}"


def target_modules(given: Sequence[str] | None, adapters: Any) -> Any:
    """`LoraConfig.target_modules` for `--target`: without it what the adapters say, and without
    both every linear layer."""
    if given and given != ["all-linear"]:
        return given
    return None if adapters and not given else "all-linear"


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=1, default=str))


def show(report: Any, as_json: bool, **more: Any) -> None:
    """Print a report, as text or as one JSON object with `more`."""
    if as_json:
        show_json({**more, **report.json()})
    else:
        print(report)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, below a title."""
    print(title, *text_table(columns, rows), sep="\n")


def on_meta(model: str, dtype: str | None = None) -> Any:
    """The model that a config.json describes, without numbers, in the dtype that it names. Raises
    ConfigError where nothing installed can make it."""
    import torch

    wanted = None if dtype is None else _dtype(dtype)
    with _readable(model), torch.device("meta"):
        cls, config = _class_and_config(model)
        made = cls.from_config(config) if isinstance(config, dict) else cls._from_config(config)
        return (made if wanted is None else made.to(wanted)).eval()


def loaded(model: str, dtype: str | None = None) -> Any:
    """The model with its weights, on the CPU or the GPU that there is, for inference. Raises
    ConfigError where it cannot be loaded."""
    with progress("importing torch"):
        import torch

    wanted = None if dtype is None else _dtype(dtype)
    with _readable(model), progress(f"loading {model}"):
        cls, config = _class_and_config(model)
        if isinstance(config, dict):
            kind = {} if wanted is None else {"torch_dtype": wanted}
        else:
            kind = {"dtype": wanted or "auto"}
        found = cls.from_pretrained(model, **kind)
    return found.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def _dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"--dtype {name}: torch has no dtype of this name")
    return found


def adapters_in(folders: Sequence[str]) -> dict[str, str]:
    """Adapters by name: each of `folders` is one, a file of one, a name on the hub, or a folder of
    adapter folders. Raises ConfigError where two are called the same, or a folder holds none."""
    from lorafx.adapter_store.peft_config import CONFIG_FILE
    from lorafx.adapter_store.saved import WEIGHTS

    def is_adapter(folder: Path) -> bool:
        return any((folder / name).is_file() for name in (CONFIG_FILE, *WEIGHTS))

    found: dict[str, str] = {}
    for given in folders:
        path = Path(given)
        several = path.is_dir() and not is_adapter(path) and not any(path.glob("*.safetensors"))
        inside = sorted(filter(is_adapter, path.iterdir())) if several else [path]
        if not inside:
            raise ConfigError(f"{given} holds no adapter, and no folder of one")
        for adapter in inside:
            name = adapter.stem if adapter.is_file() else adapter.name
            if name in found:
                raise ConfigError(f"two adapters are called {name!r}: {found[name]} and {adapter}")
            found[name] = given if adapter is path else str(adapter)
    return found


def read_for(
    module: Any, name: str, source: Any, target: Any = None, max_rank: int | None = None
) -> Any:
    """An adapter as it is read for a model whose sites `target` chooses, or the adapter. Raises as
    `read_adapter`."""
    from lorafx.adapter_store.peft_reader import read_adapter
    from lorafx.config import LoraConfig
    from lorafx.runtime.marking import build_sites, request_of

    request = request_of(LoraConfig(target_modules=target), {name: source}, module)
    _, sites = build_sites(module, request.config)
    return read_adapter(
        request.adapters[name],
        name,
        sites,
        model=module,
        lora_config=request.config,
        max_rank=max_rank,
    )


@contextmanager
def _readable(model: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{model} needs {error.name}: pip install 'lorafx[hf]'") from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{model} cannot be loaded: {error}") from error


def _class_and_config(model: str) -> tuple[Any, Any]:
    """The class that the configuration names, and transformers' configuration, or the dict of a
    model of diffusers."""
    file = Path(model) / "config.json"
    fields = json.loads(file.read_text()) if file.is_file() else {}
    if "_class_name" in fields:
        import diffusers

        name = fields["_class_name"]
        if not hasattr(diffusers, name):
            raise ConfigError(f"the installed diffusers has no {name}")
        return getattr(diffusers, name), fields
    import transformers

    from lorafx.torch_internals.transformers_parts import causal_model_class

    config = transformers.AutoConfig.from_pretrained(model)
    known = (getattr(transformers, name, None) for name in config.architectures or ())
    return next(filter(None, known), None) or causal_model_class(config), config
