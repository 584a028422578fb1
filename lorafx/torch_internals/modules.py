"""Classes of modules without a public name."""

from __future__ import annotations

from types import FrameType

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="compiled modules are seen through; norms and transposed convolutions are told by their "
    "classes; whether a module is called by nobody else",
    ended_by="public names for the classes",
)

with private_names():
    from torch import nn
    from torch._dynamo import eval_frame
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvTransposeNd

    #: The code of every module's call, and that of its caller.
    CALL = nn.Module._call_impl.__code__
    CALLS = (CALL, nn.Module._wrapped_call_impl.__code__)
    _WRAPPERS = eval_frame.__name__


def in_wrapper_of_dynamo(frame: FrameType) -> bool:
    """Whether the frame is that of Dynamo's wrapper around a compiled function."""
    return frame.f_globals.get("__name__") == _WRAPPERS
