"""Dynamo: what it traces, its guards, its settings."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="each entry of a model is a function under Dynamo with a cache of its own; guards are "
    "read, filtered and saved",
    ended_by="torch.compile with a cache for each call, and guards as data",
)

with private_names():
    from torch._C import _log_api_usage_once
    from torch._C._dynamo.guards import GlobalStateGuard
    from torch._dynamo import assume_constant_result, disable, optimize
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import innermost_fn, set_code_exec_strategy
    from torch._dynamo.exc import (
        ObservedException,
        TorchDynamoException,
        TorchRuntimeError,
        Unsupported,
    )
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import Source
    from torch._dynamo.trace_rules import check
    from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
    from torch._logging import trace_structured
