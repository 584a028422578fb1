"""What graphs are saved and loaded by."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="a compiled graph is written to a file, and put together again in another process",
    ended_by="torch.compiler.save_cache_artifacts for graphs of other backends",
    refused="Options(cache=...)",
)

with private_names():
    from torch._functorch._aot_autograd.aot_autograd_result import (
        BundledAOTAutogradResult,
        BundledCompiledForward,
    )
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.utils import BoxedBool
    from torch.fx._graph_pickler import GraphPickler, Options
