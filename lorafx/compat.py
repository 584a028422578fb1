"""What differs between the versions of torch that lorafx runs on, in one place.

Also the only place that touches Dynamo's and the symbolic-shape machinery's settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config as shape_config

_COMPILE_ARGUMENTS = inspect.signature(torch.compile).parameters


def compile_entry(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    dynamic: bool | None,
    recompile_limit: int,
) -> Callable[..., Any]:
    """`torch.compile(function)` with a cache and a recompile limit of its own where torch has them.

    Without `isolate_recompiles` every model whose forward shares a code object (transformers'
    decorators) would use up one common limit of eight.
    """
    extra: dict[str, Any] = {}
    if "isolate_recompiles" in _COMPILE_ARGUMENTS:
        extra["isolate_recompiles"] = True
    if "recompile_limit" in _COMPILE_ARGUMENTS:
        extra["recompile_limit"] = recompile_limit
    return torch.compile(function, backend=backend, dynamic=dynamic, **extra)


@contextmanager
def capture_settings(recompile_limit: int) -> Iterator[None]:
    """Settings that must hold whenever a call may capture a graph.

    - no duck shaping: a batch of 5 with 5 tokens must not make batch and length one symbol;
    - past the recompile limit Dynamo would silently run eager: make it raise instead.

    Plain attribute writes: `config.patch` costs 14 µs a call and this runs once a forward.
    """
    dynamo_config = torch._dynamo.config
    duck, fail = shape_config.use_duck_shape, dynamo_config.fail_on_recompile_limit_hit
    shape_config.use_duck_shape = False
    dynamo_config.fail_on_recompile_limit_hit = True
    shared_limit = None
    if "recompile_limit" not in _COMPILE_ARGUMENTS and (
        dynamo_config.recompile_limit < recompile_limit
    ):
        shared_limit = dynamo_config.recompile_limit
        dynamo_config.recompile_limit = recompile_limit
    try:
        yield
    finally:
        shape_config.use_duck_shape = duck
        dynamo_config.fail_on_recompile_limit_hit = fail
        if shared_limit is not None:
            dynamo_config.recompile_limit = shared_limit


def is_recompile_limit(error: BaseException) -> bool:
    """True for the error that Dynamo raises when an entry has as many graphs as it may have."""
    return isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit)
