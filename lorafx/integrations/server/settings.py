"""The options of `lorafx serve`, checked as far as possible before anything is loaded.

What a command line takes is made of these classes, so torch is imported by their methods alone.
"""

from __future__ import annotations

import socket
import ssl
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafx.adapter_store.names import BASE, SUMS
from lorafx.errors import CapacityError, ConfigError, LorafxWarning, nearest

if TYPE_CHECKING:
    from lorafx.config import LoraConfig, Options
    from lorafx.generation.continuous.shares import Share

CONFIG = "adapter_config.json"
#: The rule for names. Unprintable ones could break lines of the log, or not be requested.
UNPRINTABLE = "may have any letters and signs, also / and :, but none that cannot be printed"
_Count = Annotated[int | None, Field(ge=1)]


def _of(default: Any, description: str, **bounds: Any) -> Any:
    """A field with the help of its option."""
    return Field(default=default, description=description, **bounds)


class ModelSettings(BaseModel):
    """How a model is served: the options of `lorafx serve` (docs/serving.md), which are made of
    these fields. None is the default that is described there.

    Raises:
        ConfigError: a value or a folder cannot be used.
        CheckpointError, CapacityError: an adapter cannot be served.
    """

    # Errors must not show the key.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str
    adapters: Path | None = _of(None, "Folder of adapter folders, or one adapter's.")
    lora_modules: tuple[str, ...] = _of((), "NAME=FOLDER.")
    adapter_weight: tuple[str, ...] = _of((), "NAME=W: its part of the tokens.")
    adapter_running: tuple[str, ...] = _of((), "NAME=N: how many of its requests run at a time.")
    name: str | None = _of(None, "What requests call the base model.")
    aliases: tuple[str, ...] = ()
    max_adapters: int = 8
    max_rank: int | None = None
    slot_rank: int | None = _of(None, "Rank of a slot; larger ones take several.")
    max_host_bytes: _Count = _of(None, "Host memory that adapters may take.")
    target: tuple[str, ...] = _of((), "Module names, suffixes or all-linear.")
    dtype: str | None = None
    device: str | None = None
    page_size: _Count = None
    num_blocks: _Count = None
    max_batch_tokens: _Count = None
    max_num_seqs: _Count = None
    max_memory_percent: float | None = Field(default=None, gt=0, le=1)
    assistant_model: str | None = _of(None, "A smaller model, which guesses tokens ahead.")
    num_assistant_tokens: _Count = _of(None, "How many it guesses.")
    prompt_lookup_num_tokens: _Count = _of(None, "Guess so many by earlier text.")
    max_model_len: _Count = None
    max_logprobs: int = _of(20, "Likeliest tokens that a request may ask for; -1 for all.", ge=-1)
    max_fields: int = _of(128, "The most fields of a request.", ge=1)
    max_items: int = _of(1024, "The most entries of a field that is a list or an object.", ge=1)
    max_field_size: int = _of(
        1 << 17, "The most letters and entries of a field, but of prompts.", ge=1
    )
    max_media: int = _of(16, "The most images and sounds of a request.", ge=0)
    max_media_bytes: int = _of(4 << 20, "The most bytes of an image or a sound.", ge=1)
    allowed_media_domains: tuple[str, ...] = _of((), "Hosts from which images are fetched.")
    max_pixels: int = _of(1 << 24, "The most pixels of a request's images.", ge=1)
    max_audio_seconds: float = _of(60, "The most seconds of a request's sounds.", gt=0)
    max_queue: _Count = None
    max_body_bytes: _Count = None
    runner: Literal["auto", "generate", "pooling"] = _of(
        "auto", "generate, pooling, or auto: as the files say."
    )
    pooling: Literal["mean", "cls", "last", "max"] | None = _of(
        None, "Encoders: mean, cls, last, max."
    )
    batch_window: float = _of(2, "Encoders: ms to wait for company.", ge=0)
    temperature: float | None = Field(default=None, ge=0)
    chat_template: str | None = _of(None, "A file, or a template.")
    lowering: str = "auto"
    cache: str | None = "auto"
    warmup: bool = _of(False, "Take requests when all graphs are compiled.")
    api_key: str | None = _of(
        None,
        "Key that requests have to come with. Others can see it in the list of processes: prefer "
        "the variable.",
        repr=False,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors(include_input=False)[0]
            raise ConfigError(f"{option(str(problem['loc'][0]))}: {problem['msg']}") from None
        self._check()

    def _check(self) -> None:
        from lorafx.adapter_store.checkpoint import config_of
        from lorafx.adapter_store.saved import is_hub_name, weights_file

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
        for name in (*self.names, *self.found):
            if not name.isprintable():
                raise ConfigError(f"a name that requests ask for {UNPRINTABLE}; got {name!r}")
        if not self.found and not self.takes_adapters:
            raise ConfigError(
                "there is no adapter to serve: name a folder of adapters with --adapters, or let "
                "clients load some with --allow-runtime-loading or send some with --allow-control, "
                "or have them found when they are asked for with --resolve-adapters"
            )
        self.lora_config()
        self.shares()
        for name, path in self.found.items():
            rank = config_of(path).max_rank
            if self.max_rank is not None and rank is not None and rank > self.max_rank:
                raise CapacityError(
                    f"{name!r} in {path} has rank {rank}, which is more than --max-rank "
                    f"{self.max_rank}; give --max-rank {rank} or more, or leave it out"
                )
            weights_file(path)

    @cached_property
    def found(self) -> dict[str, Path]:
        """The adapters at the start, of `adapters` and `lora_modules`: name -> folder."""
        found = {} if self.adapters is None else _adapter_folders(self.adapters)
        for name, folder in map(_named_folder, self.lora_modules):
            if name in found:
                raise ConfigError(
                    f"two adapters are called {name!r}: {found[name]}, and {folder}, which "
                    "--lora-modules names"
                )
            found[name] = folder
        return found

    @property
    def served_name(self) -> str:
        """The name of the base model in requests."""
        folder = Path(self.model)
        return self.name or (folder.resolve().name if folder.is_dir() else self.model)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names of the base model in requests."""
        return (self.served_name, *self.aliases)

    def may_mean(self, model: str) -> Sequence[str]:
        """The adapters that a request's field `model` may mean, the likeliest first; none if it
        names the base model."""
        if model in self.names:
            return ()
        bases = (f"{name}:" for name in self.names)
        return [*(model.removeprefix(base) for base in bases if model.startswith(base)), model]

    def shares(self) -> dict[str | None, Share]:
        """Those of `adapter_weight` and `adapter_running` by adapter, None for the base."""
        from lorafx.generation.continuous.shares import Share, checked_share

        found: dict[str | None, Share] = {}
        given = (("adapter_weight", "weight", float), ("adapter_running", "most_running", int))
        for field, name, kind in given:
            for text in getattr(self, field):
                model, _, number = text.rpartition("=")
                adapters = self.may_mean(model)
                known = [a for a in adapters if a in self.found or a == SUMS]
                if adapters and not known and not (model and self.takes_adapters):
                    near = nearest(model, [*self.names, *self.found])
                    raise ConfigError(
                        f"{option(field)} takes NAME=NUMBER, the name an adapter's or the base's; "
                        f"got {text!r}, and there is no {model!r}{near}"
                    )
                adapter = [*known, *adapters][0] if adapters else None
                with suppress(ValueError):  # a string is refused by the check
                    number = kind(number)
                share = replace(found.get(adapter, Share()), **{name: number})
                found[adapter] = checked_share(f"{option(field)} {text}", share)
        return found

    def root(self) -> Path | None:
        """The folder from which clients may load adapters; None if they may not."""
        return None

    @property
    def takes_adapters(self) -> bool:
        """Whether there may be adapters that are not there at the start."""
        return self.root() is not None

    def folder_of(self, adapter: str) -> Path | None:
        """The folder of an adapter, also of one that was added to `adapters` later; None if there
        is no such adapter."""
        known = self.found.get(adapter)
        if known is not None:
            return known if (known / CONFIG).is_file() else None
        return None if self.adapters is None else adapter_folder(self.adapters, adapter)

    def folders(self) -> list[str]:
        """The names of the adapters that have a folder now."""
        assert self.adapters is not None
        return list(dict.fromkeys((*self.found, *_adapter_folders(self.adapters))))

    def options(self) -> Options:
        """How the model is compiled."""
        from lorafx.config import Options

        return Options.of({"lowering": self.lowering, "cache": self.cache})

    def lora_config(self) -> LoraConfig:
        """The configuration of the model: which modules carry LoRA, ranks and slots."""
        from lorafx.adapter_store.checkpoint import config_of
        from lorafx.config import LoraConfig

        targets: Any = list(self.target) or None
        saved = [config_of(folder) for folder in self.found.values()]
        max_rank = self.max_rank
        if max_rank is None:  # adapters that clients load may have larger ranks than these
            ranks = [config.max_rank for config in saved if config.max_rank is not None]
            max_rank = max([16 if self.takes_adapters else 1, *ranks])
        return LoraConfig(
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            max_adapters=self.max_adapters,
            max_rank=max_rank,
            slot_rank=self.slot_rank,
            max_host_bytes=self.max_host_bytes,
            use_dora=any(config.use_dora for config in saved),
            lora_bias=any(config.lora_bias or config.bias != "none" for config in saved),
        )

    def guesses(self) -> dict[str, Any]:
        """Arguments of `continuous_batching` by which tokens are guessed ahead."""
        names = ("assistant_model", "num_assistant_tokens", "prompt_lookup_num_tokens")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def engine(self, on_cpu: bool) -> dict[str, Any]:
        """Arguments of `ContinuousBatchingConfig`."""
        names = ("page_size", "num_blocks", "max_batch_tokens", "max_memory_percent")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.max_num_seqs is not None:
            chosen["max_requests_per_batch"] = self.max_num_seqs
        if on_cpu and not {"num_blocks", "max_memory_percent"} & chosen.keys():
            chosen["max_memory_percent"] = 0.1
        return chosen


class Settings(ModelSettings):
    """The options of `lorafx serve`. Raises what `ModelSettings` raises."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_queue: _Count = _of(1024, "Sequences under way; further requests get 429.")
    max_body_bytes: _Count = 8 << 20
    allow_control: bool = _of(False, "Let clients pause, and send weights.")
    max_upload_bytes: int = Field(default=1 << 30, ge=1)
    allow_runtime_loading: bool = False
    resolve_adapters: bool = _of(False, "Load adapters when they are asked for.")
    max_adapter_reads: int = Field(default=2, ge=1)
    adapter_root: Path | None = None
    drain: int | None = _of(None, "Seconds to wait for answers under way when it is stopped.", ge=0)
    allowed_origins: tuple[str, ...] = ()
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = _of(None, "Serve HTTPS with it.")
    ssl_ca_certs: Path | None = None
    ssl_cert_reqs: int = Field(default=0, ge=0, le=2)
    ssl_ciphers: str | None = None
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"

    def tls(self) -> dict[str, Any]:
        """Arguments of `uvicorn.Config`; none for plain HTTP. Raises ConfigError if the files
        cannot be used."""
        names = [name for name in Settings.model_fields if name.startswith("ssl_")]
        values = {name: getattr(self, name) for name in names if getattr(self, name)}
        if values:
            try:
                if self.ssl_certfile is None:
                    raise OSError("there is no certificate")
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                    self.ssl_certfile, self.ssl_keyfile
                )
            except OSError as error:
                raise ConfigError(
                    f"no HTTPS with --ssl-certfile {self.ssl_certfile} and --ssl-keyfile "
                    f"{self.ssl_keyfile}: {error}"
                ) from error
        return values

    def root(self) -> Path | None:
        if not self.allow_runtime_loading and not self.resolve_adapters:
            if self.adapter_root is not None:
                raise ConfigError(
                    "--adapter-root does nothing without --allow-runtime-loading or "
                    "--resolve-adapters"
                )
            return None
        root = self.adapter_root or self.adapters
        if root is None:
            given = "resolve_adapters" if self.resolve_adapters else "allow_runtime_loading"
            raise ConfigError(
                f"{option(given)} needs the folder that adapters may be loaded from: "
                "--adapter-root FOLDER"
            )
        return root.resolve()

    @property
    def takes_adapters(self) -> bool:
        return self.allow_control or super().takes_adapters

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


def adapter_folder(root: Path, name: str) -> Path | None:
    """The folder directly in `root` that has the name of an adapter; None if it is none."""
    hidden = name in ("", BASE) or name.startswith(".") or not name.isprintable()
    if hidden or Path(name).name != name:  # which names another folder
        return None
    try:
        return root / name if (root / name / CONFIG).is_file() else None
    except OSError:  # the name is too long
        return None


def _named_folder(text: str) -> tuple[str, Path]:
    """The name and the folder of one of `lora_modules`."""
    name, _, path = text.partition("=")
    if not name or not (Path(path) / CONFIG).is_file():
        raise ConfigError(
            f"--lora-modules takes NAME=FOLDER, a folder with an {CONFIG}; got {text}"
        )
    return name, Path(path)


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
