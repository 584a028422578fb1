"""The options of `lorafx serve`, checked as far as possible before anything is loaded."""

from __future__ import annotations

import socket
import warnings
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafx.adapter_store.checkpoint import config_of
from lorafx.adapter_store.saved import PICKLED, SAFETENSORS, WEIGHTS, is_hub_name
from lorafx.config import LoraConfig, Options
from lorafx.errors import CapacityError, CheckpointError, ConfigError, LorafxWarning

CONFIG = "adapter_config.json"
#: The rule for names. Unprintable ones could break lines of the log, or not be requested.
UNPRINTABLE = "may have any letters and signs, also / and :, but none that cannot be printed"
_Count = Annotated[int | None, Field(ge=1)]


class ModelSettings(BaseModel):
    """How a model is served: the options of `lorafx serve` (docs/serving.md). None is the default
    that is described there.

    Raises:
        ConfigError: a value or a folder cannot be used.
        CheckpointError, CapacityError: an adapter cannot be served.
    """

    # Errors must not show the key.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str
    adapters: Path | None = None
    name: str | None = None
    max_adapters: int = 8
    max_rank: int | None = None
    slot_rank: int | None = None
    max_host_bytes: _Count = None
    target: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    page_size: _Count = None
    num_blocks: _Count = None
    max_batch_tokens: _Count = None
    max_memory_percent: float | None = Field(default=None, gt=0, le=1)
    temperature: float | None = Field(default=None, ge=0)
    lowering: str = "auto"
    cache: str | None = "auto"
    warmup: bool = False
    api_key: str | None = Field(default=None, repr=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors(include_input=False)[0]
            raise ConfigError(f"{option(str(problem['loc'][0]))}: {problem['msg']}") from None
        self._check()

    def _check(self) -> None:
        key = self.api_key
        if key is not None and not (key and all("!" <= letter <= "~" for letter in key)):
            raise ConfigError(
                "--api-key, or the variable LORAFX_API_KEY, is at least one visible ASCII "
                "character, and no spaces; leave it out to answer everybody"
            )
        self.options()
        folder = Path(self.model)
        on_hub = "/" not in self.model or is_hub_name(self.model)
        if (folder.exists() or not on_hub) and not (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder} is no model: it has no config.json; name a folder that save_pretrained "
                "wrote, or a model of the hub"
            )
        root = self.root()
        if root is not None and not root.is_dir():
            raise ConfigError(f"{root}, from which adapters are to be loaded, is not a folder")
        for name in (self.served_name, *self.found):
            if not name.isprintable():
                raise ConfigError(f"a name that requests ask for {UNPRINTABLE}; got {name!r}")
        if not self.found and root is None:
            raise ConfigError(
                "there is no adapter to serve: name a folder of adapters with --adapters, or let "
                "clients load some with --allow-runtime-loading"
            )
        self.lora_config()
        for name, path in self.found.items():
            rank = config_of(path).max_rank
            if self.max_rank is not None and rank is not None and rank > self.max_rank:
                raise CapacityError(
                    f"{name!r} in {path} has rank {rank}, which is more than --max-rank "
                    f"{self.max_rank}; give --max-rank {rank} or more, or leave it out"
                )
            if not any((path / file).is_file() for file in WEIGHTS):
                raise CheckpointError(
                    f"{path} holds no adapter weights: neither {SAFETENSORS} nor {PICKLED}"
                )

    @cached_property
    def found(self) -> dict[str, Path]:
        """The adapters in the folder `adapters` at the start: name -> folder."""
        return {} if self.adapters is None else _adapter_folders(self.adapters)

    @property
    def served_name(self) -> str:
        """The name of the base model in requests."""
        folder = Path(self.model)
        return self.name or (folder.resolve().name if folder.is_dir() else self.model)

    def root(self) -> Path | None:
        """The folder from which clients may load adapters; None if they may not."""
        return None

    def folder_of(self, adapter: str) -> Path | None:
        """The folder of an adapter, also of one that was added to `adapters` later; None if there
        is no such adapter."""
        folder = self.found.get(adapter)
        if folder is None:
            if self.adapters is None or not adapter or adapter.startswith("."):
                return None
            if Path(adapter).name != adapter:  # a path to another folder
                return None
            folder = self.adapters / adapter
        try:
            return folder if (folder / CONFIG).is_file() else None
        except OSError:  # the name is too long
            return None

    def folders(self) -> list[str]:
        """The names of the adapters that have a folder now."""
        assert self.adapters is not None
        return list(_adapter_folders(self.adapters))

    def options(self) -> Options:
        """How the model is compiled."""
        return Options.of({"lowering": self.lowering, "cache": self.cache})

    def lora_config(self) -> LoraConfig:
        """The configuration of the model: which modules carry LoRA, ranks and slots."""
        targets: Any = list(self.target) or None
        saved = [config_of(folder) for folder in self.found.values()]
        max_rank = self.max_rank
        if max_rank is None:  # adapters that clients load may have larger ranks than these
            ranks = [config.max_rank for config in saved if config.max_rank is not None]
            max_rank = max([16 if self.root() else 1, *ranks])
        return LoraConfig(
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            max_adapters=self.max_adapters,
            max_rank=max_rank,
            slot_rank=self.slot_rank,
            max_host_bytes=self.max_host_bytes,
            use_dora=any(config.use_dora for config in saved),
            lora_bias=any(config.lora_bias or config.bias != "none" for config in saved),
        )

    def engine(self, on_cpu: bool) -> dict[str, Any]:
        """Arguments of `ContinuousBatchingConfig`."""
        names = ("page_size", "num_blocks", "max_batch_tokens", "max_memory_percent")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if on_cpu and not {"num_blocks", "max_memory_percent"} & chosen.keys():
            chosen["max_memory_percent"] = 0.1
        return chosen


class Settings(ModelSettings):
    """The options of `lorafx serve`. Raises what `ModelSettings` raises."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    allow_runtime_loading: bool = False
    adapter_root: Path | None = None
    drain: int | None = Field(default=None, ge=0)

    def root(self) -> Path | None:
        if not self.allow_runtime_loading:
            if self.adapter_root is not None:
                raise ConfigError("--adapter-root does nothing without --allow-runtime-loading")
            return None
        root = self.adapter_root or self.adapters
        if root is None:
            raise ConfigError(
                "--allow-runtime-loading needs the folder that adapters may be loaded from: "
                "--adapter-root FOLDER"
            )
        return root

    def bind(self) -> socket.socket:
        """A socket that is bound to `host` and `port` and does not listen yet. Raises ConfigError
        if it cannot be bound."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"no requests can be taken on {self.host}, port {self.port}: {error}; choose "
                "others with --host and --port"
            ) from error
        return listener


def option(name: str) -> str:
    """The option of `lorafx serve` that sets a field."""
    return f"--{name.replace('_', '-')}"


def _adapter_folders(folder: Path) -> dict[str, Path]:
    """The adapters in `folder`, by the names of their folders. Warns of folders without one."""
    if not folder.is_dir():
        raise ConfigError(f"--adapters: {folder} is not a folder")
    if (folder / CONFIG).is_file():
        return {folder.resolve().name: folder}
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    adapters = {path.name: path for path in inside if (path / CONFIG).is_file()}
    ignored = [path.name for path in inside if path.name not in adapters]
    if ignored:
        warnings.warn(
            f"{', '.join(ignored[:10])} in {folder} have no {CONFIG} and are not served",
            LorafxWarning,
            stacklevel=2,
        )
    return adapters
