"""What `serve run lorafx.server.ray:build key=value` starts."""

# No `from __future__ import annotations`: Ray reads from an annotation which class `build` takes.
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json
from ray import serve
from ray.serve import Application

from lorafx.errors import ConfigError
from lorafx.server.ray.ingress import Ingress
from lorafx.server.ray.replica import Replica
from lorafx.server.settings import Settings

#: Seconds for which a replica that is stopped waits for answers, where nothing else is said.
DRAIN = 600
#: Of an ingress. It holds no model, so it is not what runs out.
RELAYED = 10_000


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


class RaySettings(BaseModel):
    """How a model is served on Ray (docs/serving.md). The fields of `Settings` are as there; paths
    are the same on all machines.

    Attributes:
        held: how many adapters a replica has in host memory; the one that was not asked for longest
            makes room. `max_adapters` of them have a slot on the device.
        num_replicas: how many engines, or "auto".
        num_gpus, num_cpus: of each of them.
        num_ingresses: how many processes read requests and send them to replicas.
        max_ongoing_requests: that a replica is given; others wait for one at the ingress.
        drain: seconds for which a replica that is stopped waits for the answers under way.
        deployment: other options of `serve.deployment`, for the replicas; JSON on a command line.
    """

    # What is given may hold the key.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: str
    adapters: str
    name: str | None = None
    max_adapters: int = 8
    max_rank: int | None = None
    slot_rank: int | None = None
    max_host_bytes: int | None = None
    target: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    dtype: str | None = None
    device: str | None = None
    page_size: int | None = None
    num_blocks: int | None = None
    max_batch_tokens: int | None = None
    max_memory_percent: float | None = None
    temperature: float | None = None
    lowering: str = "auto"
    cache: str | None = None
    api_key: str | None = Field(
        default_factory=lambda: os.environ.get("LORAFX_API_KEY"), repr=False
    )
    drain: int = DRAIN
    held: int = Field(default=64, ge=1)
    num_replicas: int | Literal["auto"] | None = None
    num_gpus: float = Field(default=0, ge=0)
    num_cpus: float = Field(default=1, ge=0)
    num_ingresses: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=256, ge=1)
    deployment: dict[str, Any] | Json[dict[str, Any]] = {}

    def settings(self) -> Settings:
        """How each replica serves; raises as `Settings`."""
        given = self.model_dump(include=set(Settings.__dataclass_fields__))
        # Replicas work in another folder than who starts them.
        if Path(self.model).is_dir():
            given["model"] = str(Path(self.model).absolute())
        if self.cache is not None:
            given["cache"] = str(Path(self.cache).absolute())
        return Settings(**{**given, "adapters": Path(self.adapters).absolute()})

    def replicas(self) -> dict[str, Any]:
        """Options of the replicas' deployment. Raises ConfigError where one is given twice."""
        actor = {"num_gpus": self.num_gpus, "num_cpus": self.num_cpus}
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "graceful_shutdown_timeout_s": self.drain,
        }
        if self.num_replicas is not None:
            options["num_replicas"] = self.num_replicas
        others = dict(self.deployment)
        actor_others = others.pop("ray_actor_options", {})
        twice = sorted((options.keys() & others.keys()) | (actor.keys() & actor_others.keys()))
        if twice:
            raise ConfigError(
                f"`deployment` gives {', '.join(twice)}, which are settings of their own here; "
                "give them there (`drain` is graceful_shutdown_timeout_s)"
            )
        return {**options, **others, "ray_actor_options": {**actor, **actor_others}}


def build(args: RaySettings) -> Application:
    """An application for `serve.run`; also a builder for `serve run` and configuration files.
    Raises as `Settings`, before anything has been started."""
    settings, options = args.settings(), args.replicas()
    replicas = serve.deployment(name="Replica", **options)(Replica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.num_ingresses,
        max_ongoing_requests=RELAYED,
        graceful_shutdown_timeout_s=args.drain,
    )(serve.ingress()(Ingress))
    return ingress.bind(replicas.bind(settings, args.held), settings)
