"""AOTAutograd, whose import takes long: the functional graph that follows Dynamo's."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._dynamo.backends.common import aot_autograd
