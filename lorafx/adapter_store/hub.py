"""Adapters from the Hugging Face hub or its cache, and whether the hub has a model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorafx.errors import CheckpointError, ConfigError

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(f"{_PART}/{_PART}")
#: Old models have no owner.
_MODEL = re.compile(f"({_PART}/)?{_PART}")
#: Seconds to wait for the hub.
_PATIENCE = 5
#: Only these files of a repository are downloaded.
_PATTERNS = ["adapter_*", "adapters.safetensors", "pytorch_lora_weights.*", "*.safetensors"]


def is_name(source: str) -> bool:
    """Whether `source` reads "owner/name"."""
    return _NAME.fullmatch(source) is not None


def is_repository(source: str) -> bool:
    """Whether `source` reads "owner/name" and is no local path."""
    return is_name(source) and not os.path.lexists(source)


def downloaded(name: str, revision: str | None) -> Path:
    """The repository's snapshot folder. Raises CheckpointError if huggingface_hub cannot get it."""
    absent = f"adapter folder {name} does not exist here"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{absent}; adapters on the hub need huggingface_hub: pip install 'lorafx[hf]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_PATTERNS,
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # network, HTTP or hub errors
        raise CheckpointError(
            f"{absent}, and {name!r} cannot be had from the hub: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return f"{first:.300}"


def check_model(name: str) -> None:
    """Raise ConfigError, within seconds, unless `name` is a folder or a model on the hub."""
    if os.path.lexists(name):
        return
    absent = f"{name} cannot be loaded: there is no folder of that name"
    if _MODEL.fullmatch(name) is None:
        raise ConfigError(f'{absent}; name a model\'s folder, or a model of the hub ("owner/name")')
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    except ImportError:  # loading the model reports it
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    absent += ", and no such model in the hub's local cache"
    try:
        HfApi().model_info(name, timeout=_PATIENCE)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{absent} or on the hub; correct the name, or log in where the model is private"
        ) from error
    except HfHubHTTPError:  # a mirror with files only, a gated model
        return
    except Exception as error:  # offline
        raise ConfigError(f"{absent}; the hub cannot be asked: {_reason(error)}") from error
