"""What a kernel for a LoRA node may take for granted; only metadata is read."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from lorafx.graph.context import EMBEDDING_OP, EXPERT_OP, FUSED_OP
from lorafx.graph.pointwise_region import PointwiseRegion
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import Ranges
from lorafx.kernels.triton.build import TritonSpec
from lorafx.op_arguments import bound
from lorafx.passes.fuse.fuse_experts import FUSED_EXPERTS, region
from lorafx.program.frame import fake_value


def delta_spec(node: fx.Node) -> DeltaSpec:
    """What a kernel for its delta takes for granted."""
    call = bound(node)
    if node.target is EMBEDDING_OP:
        return DeltaSpec.of_embedding(*(fake_value(call[name]) for name in ("y", "A", "B")))
    tensors = (fake_value(call[name]) for name in ("x", "A", "B", "ranks"))
    return DeltaSpec.linear(fake_value(node), *tensors, *(call[name] for name in Ranges._fields))


def cpu_spec(node: fx.Node) -> DeltaSpec:
    """`delta_spec` of a kernel on a CPU, which finds the bank's slots of routed rows by itself."""
    spec = delta_spec(node)
    if node.target is EXPERT_OP:
        return replace(spec, experts=bound(node)["count"])
    if node.target is FUSED_EXPERTS:
        return replace(spec, experts=int(fake_value(bound(node)["weight"]).shape[0]))
    return spec


def triton_spec(node: fx.Node) -> TritonSpec:
    """`delta_spec`, and the base weight where it is part of the node."""
    if node.target not in (FUSED_OP, FUSED_EXPERTS):
        return TritonSpec(delta_spec(node))
    call = bound(node)
    weight, transposed = fake_value(call["weight"]), call["transposed"]
    if node.target is FUSED_EXPERTS:
        found = region(node)
        activation = found.activation if isinstance(found, PointwiseRegion) else None
        return TritonSpec(
            *(delta_spec(node), weight.dtype, False, transposed),
            experts=weight.shape[0],
            activation=activation,
        )
    n, slots = fake_value(call["slots"]).shape[0], fake_value(call["B"]).shape[0]
    return TritonSpec(
        *(delta_spec(node), weight.dtype, call["bias"] is not None, transposed),
        # as few blocks as the sizes of the graph allow
        by_request=isinstance(n, int) and n < slots,
    )
