"""The kernels that a graph will need on a CPU, as far as it can be told before passes run over it.

    before Dynamo     products with dense weights and with those of experts; deltas of sites that
                      have no siblings
    before AOT        deltas of siblings, by what they read in Dynamo's graph: those that share an
                      input and a packed weight become one node (lorafx.passes.pack)

What is foreseen is compiled while Dynamo and AOTAutograd trace (lorafx.kernels.cpu.compile_ahead).
The passes decide by the traced graph, and compile what they need as if nothing had been foreseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.config import Options
from lorafx.graph.context import SITE_OP
from lorafx.graph.strategy import GENERATED
from lorafx.kernels.cpu.compile_ahead import Foreseen
from lorafx.kernels.cpu.cpu_source import ELEMENTS
from lorafx.kernels.cpu.product_source import ProductSpec
from lorafx.kernels.ops.bank_arguments import Ranges
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.model.bank import Bank
from lorafx.model.sites import Group, Site
from lorafx.op_arguments import bound
from lorafx.program.frame import Frame
from lorafx.program.program import Program

#: Kinds of sites whose deltas have generated kernels.
_KINDS = ("linear", "embedding", "experts")


def before_tracing(program: Program) -> Foreseen:
    """What any graph of `program` will probably ask for; nothing but metadata is read."""
    options = program.options
    if not _generates(options):
        return Foreseen()
    sites = [site for site in program.sites if site.device.type == "cpu"]
    alone = [
        group
        for group in program.groups
        if len(group.sites) == 1 and group.sites[0].eligible.kind in _KINDS
    ]
    return Foreseen(
        [_of_site(group) for group in alone if _wanted(options, group.sites)],
        [spec for site in sites if (spec := _product(program, site)) is not None],
        [site.dtype for site in sites if site.eligible.is_linear and options.runs("products")],
    )


def in_captured(program: Program, frame: Frame, graph: fx.Graph) -> Foreseen:
    """What the passes over a graph that Dynamo captured will ask for beside that."""
    if not _generates(program.options):
        return Foreseen()
    groups = {
        node: item.group
        for node, item in zip(graph.find_nodes(op="placeholder"), frame.inputs, strict=True)
        if item.group is not None
    }
    together: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for target in (SITE_OP, SITE_OP.overloadpacket):
        for node in graph.find_nodes(op="call_function", target=target):
            call = bound(node)
            shared = (call["x"], call["A"], call["weight"])
            key = (*shared, node if call["weight"] is None else None)
            together.setdefault(key, []).append({**call, "result": node})
    deltas: list[DeltaSpec] = []
    for (_, A, *_), calls in together.items():
        group = groups.get(A)
        if group is not None and len(group.sites) > 1:
            deltas += _of_siblings(program.options, group, calls)
    return Foreseen(deltas)


def _generates(options: Options) -> bool:
    return options.lowering == "inductor" and options.runs("plan")


def _wanted(options: Options, sites: Sequence[Site]) -> bool:
    """Whether they are on a CPU, and nobody has pinned another strategy."""
    here = all(site.device.type == "cpu" for site in sites)
    return here and all(options.plan.get(site.path, GENERATED) == GENERATED for site in sites)


def _of_site(group: Group) -> DeltaSpec:
    site, bank = group.sites[0], group.bank
    like = torch.empty((), dtype=site.dtype, device="meta")  # x and y, as a rule
    if site.eligible.kind == "embedding":
        return DeltaSpec.of_embedding(like, bank.A, bank.B)
    return _linear(like, like, bank, group.ranges(0), site.experts if site.expert_weight else 0)


def _of_siblings(
    options: Options, group: Group, calls: Sequence[dict[str, Any]]
) -> Iterator[DeltaSpec]:
    """The deltas of siblings that share an input: one for each run without a gap."""
    runs: list[list[dict[str, Any]]] = []
    end = None
    for call in sorted(calls, key=lambda call: call["offsets"][0]):
        if runs and call["offsets"][0] == end:
            runs[-1].append(call)
        else:
            runs.append([call])
        end = call["offsets"][0] + sum(call["sizes"])
    for run in runs:
        ranges = Ranges(*([n for call in run for n in call[name]] for name in Ranges._fields))
        if _wanted(options, [group.site_of(sibling) for sibling in ranges.siblings]):
            y, x = (run[0][name].meta["example_value"] for name in ("result", "x"))
            yield _linear(y, x, group.bank, ranges)


def _linear(y: Tensor, x: Tensor, bank: Bank, ranges: Ranges, experts: int = 0) -> DeltaSpec:
    siblings, offsets, sizes = map(list, ranges)
    return DeltaSpec.linear(y, x, bank.A, bank.B, bank.ranks, siblings, offsets, sizes, experts)


def _product(program: Program, site: Site) -> ProductSpec | None:
    """The base's product with the weights of experts, where it has a kernel for them."""
    held = site.expert_weight
    weight = None if held is None else program.weight_of(site)
    if held is None or weight is None or held.transposed or weight.dim() != 3:
        return None
    _, N, K = weight.shape
    fits = weight.is_contiguous() and weight.dtype in ELEMENTS and K and N
    return ProductSpec(weight.dtype, K, N) if fits else None
