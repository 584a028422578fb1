"""The parts of graphs: operators, fake tensors, symbolic sizes and nested containers; and modes,
which see every operator that runs.
"""

from __future__ import annotations

import torch
from torch import distributed as dist

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch import _grouped_mm as grouped_mm
    from torch._C import (
        DisableTorchFunction,
        DispatchKeySet,
        _dispatch_keys,
        _len_torch_dispatch_stack,
        _pop_torch_dispatch_stack,
        _push_on_torch_dispatch_stack,
        _storage_Use_Count,
    )
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch._ops import (
        HigherOrderOperator,
        OperatorBase,
        OpOverload,
        OpOverloadPacket,
        _OpNamespace,
    )
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        ShapeEnv,
        guard_or_false,
        guard_or_true,
        statically_known_true,
    )
    from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import (
        TorchDispatchMode,
        _get_current_dispatch_mode,
        _get_current_dispatch_mode_stack,
        is_traceable_wrapper_subclass,
    )
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
    from torch.utils._sympy.functions import (
        CeilToInt,
        FloorDiv,
        FloorToInt,
        IntTrueDiv,
        Max,
        Min,
        Mod,
        PythonMod,
        TruncToInt,
    )

    if dist.is_available():
        # Registers the fake implementations of the functional collectives.
        import torch.distributed._functional_collectives

    storage_of_weak = torch.UntypedStorage._new_with_weak_ptr
    assert_async = torch.ops.aten._assert_async.msg
    c10d = torch.ops._c10d_functional
