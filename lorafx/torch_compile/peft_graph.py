"""Frames of PEFT-wrapped models: PEFT's own LoRA arithmetic is found in the graph and fused.

    y + lora_B(lora_A(x)) · scaling   →   one kernel that adds into y      (lorafx.passes.factors)

PEFT's modules decide what is computed: which adapters are active, merged or disabled is Python
state that Dynamo guards, so a switch compiles the frame again, as with any backend. Factors and
base weights are graph inputs; nothing of one model is kept. Whether a frame is PEFT's is decided by
class (`peft.tuners.lora.LoraLayer`), which products are LoRA by arithmetic
(`lorafx.graph.factored`).

A frame without LoRA arithmetic (merged, disabled, or no PEFT at all), and one whose result wants a
gradient, goes to Inductor untouched.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from lorafx.capture.dump import GraphDump, dump_folder
from lorafx.capture.lowering import Lowering
from lorafx.capture.pipeline import PassReport, run_passes
from lorafx.capture.verify import check_structure, output_values
from lorafx.config import Options
from lorafx.graph.factored import factor_chains
from lorafx.graph.graph_nodes import module_path
from lorafx.graph.peft_context import FactorSite, PeftContext
from lorafx.passes.factors import Factors
from lorafx.passes.lower_factors import LowerFactors
from lorafx.program.frame import arguments_of, wants_gradient
from lorafx.program.stack import innermost_module


@dataclass(eq=False)
class PeftRecord:
    """What became of one frame.

    Attributes:
        title: names the frame's folder of dumps.
        dump: the graph after each pass, where a folder for dumps is named.
        passes: what each pass did.
        sites: adapters at modules that one kernel each serves now.
        left: products of factors that stay as PEFT wrote them, with the reason.
    """

    title: str
    dump: GraphDump | None = None
    passes: list[PassReport] = field(default_factory=list)
    sites: list[FactorSite] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The record as text, which stands beside the dumps."""
        lines = [f"{item.name}: {item.edits} edits, {item.nodes} nodes" for item in self.passes]
        lines += [f"rewritten: {site}" for site in self.sites]
        return lines + [f"as PEFT wrote it: {text}" for text in self.left]


PIPELINE = (Factors(), LowerFactors())
_TITLES = itertools.count()
#: What became of the frames that were compiled last.
_RECENT: deque[PeftRecord] = deque(maxlen=64)


def has_peft_lora(gm: fx.GraphModule, examples: Sequence[Any]) -> bool:
    """True where the Dynamo graph `gm` holds LoRA arithmetic of a PEFT model that may be fused.

    That is a linear of a linear inside one `LoraLayer`, and no result that wants a gradient.
    """
    layer = _lora_layer()
    if layer is None or wants_gradient(examples):
        return False
    # A layer's forward is a frame by itself where its caller could not be traced.
    running = innermost_module()
    root = str(id(running)) if isinstance(running, layer) else None
    linears: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch._C._nn.linear:
            owner = _owner(node, layer) or root
            if owner is not None:
                linears[node] = owner
    return any(linears.get(arguments_of(node)[0]) == owner for node, owner in linears.items())


def compile_peft_frame(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Options,
    lowering: Lowering,
) -> Callable[..., Any]:
    """Compile a frame for which `has_peft_lora` holds.

    Args:
        gm, examples: as Dynamo hands them to a backend.
        options: `lowering` (which only "reference" changes here), `verify` (graph structure),
            `max_edits` and `dump` are honoured.
        lowering: compiles the rewritten graph.
    """
    title, folder = f"peft {next(_TITLES)}", dump_folder(options)
    record = PeftRecord(title, GraphDump(title, folder) if folder else None)

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        _run_passes(graph, PeftContext(options, graph), record)
        return lowering.compile(graph, inputs)

    executable = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        decompositions=lowering.decompositions(),
    )(gm, examples)
    _RECENT.append(record)
    return executable


def recent_records() -> list[PeftRecord]:
    """What became of the PEFT frames that this process compiled last, oldest first."""
    return list(_RECENT)


def _run_passes(gm: fx.GraphModule, ctx: PeftContext, record: PeftRecord) -> None:
    outputs = output_values(gm)

    def check(pass_name: str) -> None:
        check_structure(pass_name, gm, outputs)

    verify = check if ctx.options.verify != "off" else None
    record.passes = run_passes(PIPELINE, gm, ctx, record.dump, verify)
    record.sites = list(ctx.sites.values())
    record.left = ctx.left + [
        f"{module_path(node)}: it is not simply added to a result"
        for node in factor_chains(gm.graph)
    ]
    if record.dump is not None:
        record.dump.source("rewritten.txt", "\n".join([*record.lines(), ""]))


def _lora_layer() -> type | None:
    """PEFT's base class of LoRA layers, where a model can have any: PEFT is imported then."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", None)


def _owner(node: fx.Node, layer: type) -> str | None:
    """Identity of the innermost `LoraLayer` whose forward made `node`, as Dynamo's stack has it."""
    stack = node.meta.get("nn_module_stack") or {}
    for key, (_, cls) in reversed(list(stack.items())):
        if isinstance(cls, type) and issubclass(cls, layer):
            return str(key)
    return None
