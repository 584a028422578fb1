"""The arguments and options that several commands share, loading of the models and adapters that
they name, and printing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafx.errors import ConfigError, Setting
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

#: Fields of LoraConfig and Options -> the options of commands that set them.
_OPTIONS = {
    "cache": "--cache",
    "lowering": "--lowering",
    "max_adapters": "--max-adapters",
    "max_host_bytes": "--max-host-bytes",
    "max_rank": "--max-rank",
    "slot_rank": "--slot-rank",
    "target_modules": "--target",
}


def as_option(setting: Setting) -> str | None:
    """The words of a command for a field of LoraConfig or Options, for `respelled`."""
    option, value = _OPTIONS.get(setting.field), setting.value
    return option if option is None or value is None else f"give {option} {value!r}"


def target_modules(target: Sequence[str] | None, adapters: Any) -> Any:
    """`LoraConfig.target_modules` for `--target`. Without that option it is None, for the modules
    that the adapters name, or every linear layer if there are no adapters."""
    if target and target != ["all-linear"]:
        return target
    return None if adapters and not target else "all-linear"


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=1, default=str))


def show(report: Any, as_json: bool, **fields: Any) -> None:
    """Print a report as text, or as one JSON object with `fields` before its own."""
    if as_json:
        show_json({**fields, **report.json()})
    else:
        print(report)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, below a title."""
    print(title, *text_table(columns, rows), sep="\n")


def on_meta(model: str, dtype: str | None = None) -> Any:
    """The model that a config.json describes, on the meta device, in `dtype` or the dtype that it
    names. Raises ConfigError if no installed library can make it."""
    import torch

    torch_dtype = None if dtype is None else _dtype(dtype)
    with _readable(model), torch.device("meta"):
        cls, config = _class_and_config(model)
        module = cls.from_config(config) if isinstance(config, dict) else cls._from_config(config)
        return (module if torch_dtype is None else module.to(torch_dtype)).eval()


def loaded(model: str, dtype: str | None = None) -> Any:
    """The model with its weights for inference, on the GPU if there is one. Raises ConfigError if
    it cannot be loaded."""
    with progress("importing torch"):
        import torch

    torch_dtype = None if dtype is None else _dtype(dtype)
    with _readable(model), progress(f"loading {model}"):
        cls, config = _class_and_config(model)
        if isinstance(config, dict):
            kwargs = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
        else:
            kwargs = {"dtype": torch_dtype or "auto"}
        module = cls.from_pretrained(model, **kwargs)
    return module.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def _dtype(name: str) -> Any:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--dtype {name}: torch has no dtype of this name")
    return dtype


def adapters_in(sources: Sequence[str]) -> dict[str, str]:
    """Name -> folder, file or name on the hub. Each of `sources` is one adapter, or a folder of
    adapter folders. Raises ConfigError if two have the same name, or if a folder has none."""
    from lorafx.adapter_store.peft_config import CONFIG_FILE
    from lorafx.adapter_store.saved import WEIGHTS

    def is_adapter(folder: Path) -> bool:
        return any((folder / name).is_file() for name in (CONFIG_FILE, *WEIGHTS))

    adapters: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        several = path.is_dir() and not is_adapter(path) and not any(path.glob("*.safetensors"))
        inside = sorted(filter(is_adapter, path.iterdir())) if several else [path]
        if not inside:
            raise ConfigError(f"{source} holds no adapter, and no folder of one")
        for adapter in inside:
            name = adapter.stem if adapter.is_file() else adapter.name
            if name in adapters:
                first = adapters[name]
                raise ConfigError(f"two adapters are called {name!r}: {first} and {adapter}")
            adapters[name] = source if adapter is path else str(adapter)
    return adapters


def read_for(
    module: Any, name: str, source: Any, target: Any = None, max_rank: int | None = None
) -> Any:
    """An adapter as it is read for a model whose sites are chosen by `target`, or by the adapter if
    that is None. Raises what `read_adapter` raises."""
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
    """The class that the configuration names, and the configuration: transformers' object, or for a
    model of diffusers a dict."""
    from lorafx.adapter_store.saved import is_hub_name

    if "/" in model and not Path(model).exists() and not is_hub_name(model):
        raise ConfigError(f"{model} cannot be loaded: there is no such folder")
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
    classes = (getattr(transformers, name, None) for name in config.architectures or ())
    return next(filter(None, classes), None) or causal_model_class(config), config
