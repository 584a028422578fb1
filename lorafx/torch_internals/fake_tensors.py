"""Tensors without numbers, graphs that write nothing, and what sees every operator that runs."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch import (
        _from_functional_tensor,
        _functionalize_commit_update,
        _functionalize_replace,
        _functionalize_sync,
        _sync,
    )
    from torch._C import (
        _DisableTorchDispatch,
        _len_torch_dispatch_stack,
        _pop_torch_dispatch_stack,
        _push_on_torch_dispatch_stack,
    )
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import (
        FakeTensor,
        FakeTensorMode,
        in_kernel_invocation_manager,
        unset_fake_temporarily,
    )
    from torch.utils._python_dispatch import (
        TorchDispatchMode,
        _get_current_dispatch_mode,
        _get_current_dispatch_mode_stack,
    )
