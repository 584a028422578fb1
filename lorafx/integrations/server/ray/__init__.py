"""`lorafx serve` on Ray Serve: one engine for each replica, and requests go to the replica that
holds their adapter.

client ─▶ Ray's proxy ─▶ Ingress ── by adapter ─▶ Replica: the application of `lorafx serve`
                         reads `model`            over one engine, with continuous batching
"""

from lorafx.errors import ConfigError

try:
    from lorafx.integrations.server.ray.application import RaySettings, build
except ImportError as error:
    raise ConfigError(
        f"lorafx on Ray Serve needs {error.name}, which cannot be imported ({error}): "
        "pip install 'lorafx[ray]'"
    ) from error

__all__ = ["RaySettings", "build"]
