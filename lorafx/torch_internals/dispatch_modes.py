"""What sees every operator that runs."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="owners are followed through what Python computes between graphs",
    ended_by="public names for torch.utils._python_dispatch",
)

with private_names():
    from torch._C import (
        _DisableTorchDispatch,
        _len_torch_dispatch_stack,
        _pop_torch_dispatch_stack,
        _push_on_torch_dispatch_stack,
    )
    from torch.utils._python_dispatch import (
        TorchDispatchMode,
        _get_current_dispatch_mode,
        _get_current_dispatch_mode_stack,
    )
