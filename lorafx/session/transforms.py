"""Where torch puts something else in the place of tensors, no model is served and nothing loaded.

Under `torch.export` and `make_fx` tensors have no numbers. What was written into a slot there was
written nowhere, and calls that come after would find the base in it.
"""

from __future__ import annotations

from lorafx.errors import CaptureError
from lorafx.torch_internals.compat import transform


def refuse_transformed() -> None:
    """Raise CaptureError inside of a transform."""
    found = transform()
    if found is not None:
        raise CaptureError(
            f"lorafx is called inside of {found}, where tensors do not hold the numbers of a call. "
            "Call it outside. To export a model with an adapter, export what export_merged(name, "
            "folder) writes; to map over requests, give them as one batch"
        )
