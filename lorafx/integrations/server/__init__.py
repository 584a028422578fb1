"""`lorafx serve`: an HTTP server in OpenAI's form, where the model's name chooses the adapter."""

from __future__ import annotations

import importlib

from lorafx.errors import ConfigError

#: What cannot be imported where something is missing, and what that is.
_NEEDED = {
    **{name: name for name in ("fastapi", "uvicorn", "prometheus_client")},
    "lorafx.integrations.server.run": "transformers 5.23 or newer",
}


def check_requirements() -> None:
    """Raise ConfigError where something that the server needs is not installed."""
    for module, name in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"lorafx serve needs {name} ({error}): in a checkout of lorafx, pip install "
                "'.[serve]' 'transformers>=5.23'"
            ) from error
