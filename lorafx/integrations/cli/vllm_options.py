"""Command lines of vLLM's server, in the terms of `lorafx serve`.

--lora-modules a=x b=y --enable-lora ─▶ --lora-modules a=x --lora-modules b=y
--tensor-parallel-size 2             ─▶ ConfigError, which says what to do
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from lorafx.errors import ConfigError

#: Options that may have several values after them, or a JSON list of them.
_SEVERAL = (
    *("--lora-modules", "--served-model-name", "--name", "--allowed-origins"),
    *("--adapter-weight", "--adapter-running", "--allowed-media-domains"),
)
#: Switches of what is always on here.
_IMPLIED = (
    *("--enable-lora", "--enable-prefix-caching", "--enable-chunked-prefill"),
    *("--enable-auto-tool-choice", "--enable-request-id-headers", "--disable-log-requests"),
    *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
)
#: What there is instead -> the options that lorafx does not have.
_ABSENT: Mapping[str, str] = {
    "a server has one device; start one for each, or `serve run lorafx.integrations.server.ray:"
    "build num_replicas=N`": "tensor-parallel-size pipeline-parallel-size data-parallel-size "
    "enable-expert-parallel distributed-executor-backend",
    "the cache's share of the memory that the model leaves is --max-memory-percent": "swap-space "
    "gpu-memory-utilization kv-cache-memory-bytes cpu-offload-gb",
    "MODEL is one folder with the model, its tokenizer and its configuration": "tokenizer revision "
    "tokenizer-mode load-format hf-overrides hf-config-path download-dir",
    "--max-host-bytes bounds the bytes of adapters in host memory": "max-cpu-loras",
    "adapters have the dtype and device of their weights": "fully-sharded-loras lora-dtype",
    "quantised models are served as their config.json says": "quantization kv-cache-dtype",
    "code of a model's repository is never run": "trust-remote-code",
    "see --lowering, --cache and --warmup": "enforce-eager compilation-config",
    "see --assistant-model and --prompt-lookup-num-tokens": "speculative-config",
    "requests give a `seed` of their own": "seed",
    "--temperature sets the default of requests": "generation-config",
    "answers are parsed by the tokenizer's response_template": "tool-call-parser reasoning-parser",
    "put a proxy in front of the server": "uds root-path middleware enable-ssl-refresh",
    "the model comes first: lorafx serve MODEL": "model",
}
ABSENT = {f"--{name}": why for why, names in _ABSENT.items() for name in names.split()}


class ServeCommand(TyperCommand):
    """A command that takes what vLLM's server does, too. Raises ConfigError for an option that
    lorafx does not have."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*translated(args)])


def translated(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments of `lorafx serve` for these of vLLM's server, or of either. Raises ConfigError
    for an option that only vLLM has."""
    several, first = "", False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            if name in ABSENT:
                raise ConfigError(f"{name} is an option of vLLM's server only: {ABSENT[name]}")
            several, first = (name if name in _SEVERAL and not equals else ""), True
            if name not in _IMPLIED:
                yield name + equals + value
        elif several:
            for value in json.loads(argument) if argument.startswith("[") else (argument,):
                yield from (value,) if first else (several, value)
                first = False
        else:
            yield argument
