"""What marks ask where somebody else than lorafx traces their layers: torch.export, torch.compile.

Dynamo calls these functions while it traces, and takes what they return for a constant: no graph
has anything of them.
"""

from __future__ import annotations

import torch

from lorafx.errors import CaptureError, MatchError
from lorafx.model.runtime import Runtime
from lorafx.torch_internals.dynamo import assume_constant_result


@assume_constant_result
def refuse_at_rest(runtime: Runtime, path: str) -> bool:
    """As `RefusesAtRest.refuse`: what is traced outside of calls would be the base."""
    try:
        if runtime.resting is not None:
            runtime.resting.refuse(path, path or "the model")
    except MatchError as error:
        raise MatchError(f"{error}. {_WAY_OUT}") from None
    return True


@assume_constant_result
def refuse_exported() -> bool:
    """Refuse torch.export inside of a block of `lorafx.adapters`. What it writes would hold the
    banks, and read the slots of whatever block runs around it later.

    Raises:
        CaptureError: it runs.
    """
    if torch.compiler.is_exporting():
        raise CaptureError(
            "torch.export inside of a block of lorafx.adapters: the program would serve the "
            f"adapters of any block that runs around it. {_WAY_OUT}"
        )
    return True


_WAY_OUT = (
    "To export a model with an adapter, export what export_merged(name, folder) of lorafx.compile "
    "writes"
)
