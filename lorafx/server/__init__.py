"""`lorafx serve`: transformers' own HTTP server, and the model's name chooses the adapter."""

from __future__ import annotations

import importlib

from lorafx.errors import ConfigError


def check_requirements() -> None:
    """Raise ConfigError where something that the server needs is not installed."""
    for module in ("fastapi", "uvicorn", "openai", "prometheus_client"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"lorafx serve needs {module}, which cannot be imported ({error}): "
                "pip install 'lorafx[serve]'"
            ) from error
    try:
        importlib.import_module("lorafx.server.run")
    except ImportError as error:
        raise ConfigError(
            f"lorafx serve needs transformers 5.23 or newer ({error}): "
            "pip install 'lorafx[serve]' 'transformers>=5.23'"
        ) from error
