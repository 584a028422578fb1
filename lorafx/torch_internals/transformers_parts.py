"""Parts of transformers without a public name."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lorafx.torch_internals.versions import private_names


def stream_error(message: str) -> Any:
    """The object that transformers' server puts into a stream if generation failed."""
    with private_names():
        from transformers.cli.serving.utils import _StreamError

        return _StreamError(message)


def causal_model_class(config: Any) -> type:
    """The class that AutoModelForCausalLM has for a configuration. Raises KeyError if none."""
    import transformers

    with private_names():
        mapping: Any = transformers.AutoModelForCausalLM._model_mapping
    model_class: type = mapping[type(config)]
    return model_class
