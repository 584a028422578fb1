"""`lorafx serve`: transformers' own HTTP server, and the model's name chooses the adapter."""

from __future__ import annotations

import importlib

from lorafx.errors import ConfigError

#: What cannot be imported, what is missing then, and what installs it.
_NEEDED = (
    *((module, module, "'lorafx[serve]'") for module in ("fastapi", "uvicorn", "openai")),
    ("prometheus_client", "prometheus_client", "'lorafx[serve]'"),
    (
        "lorafx.integrations.server.run",
        "transformers 5.23 or newer",
        "'lorafx[serve]' 'transformers>=5.23'",
    ),
)


def check_requirements() -> None:
    """Raise ConfigError where something that the server needs is not installed."""
    for module, name, packages in _NEEDED:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"lorafx serve needs {name} ({error}): pip install {packages}"
            ) from error
