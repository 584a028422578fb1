"""Adapters on the Hugging Face hub, by huggingface_hub: from its cache, or downloaded into it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorafx.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: What an adapter may consist of. Nothing else of a repository is downloaded.
_PATTERNS = ["adapter_*", "adapters.safetensors", "pytorch_lora_weights.*", "*.safetensors"]


def is_repository(source: str) -> bool:
    """Whether `source` reads "owner/name", and nothing on this machine is called so."""
    return _NAME.fullmatch(source) is not None and not os.path.lexists(source)


def downloaded(name: str, revision: str | None) -> Path:
    """The folder of the repository's snapshot. HF_HUB_OFFLINE and the other settings of
    huggingface_hub apply.

    Raises:
        CheckpointError: huggingface_hub is not installed, or cannot get it.
    """
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
    except Exception as error:  # of the network, of HTTP, of the hub
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{absent}, and {name!r} cannot be had from the hub: {reason:.300}"
        ) from error
