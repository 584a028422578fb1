"""The Dynamo backend of one program: a captured frame goes in, an executable comes out.

Without an active adapter a frame is compiled exactly as the base model would be. With one it goes
through AOTAutograd to the functional ATen graph, the passes, and the lowering; so do parts without
sites, since a later graph may rest on whose rows their results are. The executable keeps nothing
of one layer: weights, banks and slots are graph inputs, and what `match` had to add is looked up
by the weight of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from lorafx.context import Context, Refusal, SiteState
from lorafx.dump import GraphDump, dump_folder
from lorafx.errors import MatchError, ProvenanceError
from lorafx.frame import Frame, calling_modules
from lorafx.handover import Handover
from lorafx.kernels.triton_build import source_of
from lorafx.lowering import Lowering, lowering_for
from lorafx.pipeline import PassReport, run_pipeline
from lorafx.program import Program
from lorafx.progress import progress
from lorafx.sites import Site
from lorafx.verify import NumericCheck


@dataclass(eq=False)
class GraphRecord:
    """What is known about one compiled graph; `explain`, `dump` and the tests read it."""

    title: str
    lora: bool
    dump: GraphDump
    passes: list[PassReport] = field(default_factory=list)
    states: list[SiteState] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    handover: Handover = field(default_factory=Handover)
    inside: dict[tuple[int, int], bool] = field(default_factory=dict)  # as in Frame

    def refuse_changed(self, program: Program) -> None:
        """Refuse the running batch: an input is not what it was when the graph was captured."""
        touched = [state.site.path for state in self.states if program.is_touched(state.site)]
        if touched:
            raise ProvenanceError(
                f"this batch mixes adapters, and at {', '.join(touched)} a tensor comes from "
                "elsewhere than when the graph was captured, so it is not proved which request a "
                "row belongs to. Run one adapter a batch"
            )

    def check(self, program: Program) -> None:
        """Refuse the running batch where this graph cannot serve it.

        Raises:
            MatchError: an adapter of the batch touches a site whose weight is used in a way that
                LoRA cannot be applied to.
            ProvenanceError: the batch mixes adapters that touch a site whose rows have no proved
                owner.
        """
        runtime = program.runtime
        for refusal in self.refusals:
            if refusal.when == "mixed" and runtime.uniform:
                continue
            touched = [site for site in refusal.sites if program.is_touched(site)]
            if touched:
                names = ", ".join(site.path or "(root)" for site in touched)
                if refusal.when == "always":
                    raise MatchError(
                        f"LoRA cannot be applied at {names}: {refusal.reason}. Take the module out "
                        "by exclude_modules, or unload the adapters that touch it"
                    )
                raise ProvenanceError(
                    f"this batch mixes adapters, and at {names} it is not proved which request a "
                    f"row belongs to: {refusal.reason}. Run one adapter a batch, say which "
                    "dimension of an argument holds the requests by LoraConfig(row_dims=...), or "
                    "take the module out by exclude_modules"
                )


class Backend:
    """Compiles the frames of one program. One instance a CompiledModel; graphs are not shared."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.records: list[GraphRecord] = []
        #: Some graph takes what another made: results are worth keeping note of.
        self.several_graphs = False
        self.lowering: Lowering = lowering_for(program.options)

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """Compile a frame of calls with one slot a request."""
        return self._compile(gm, examples, per_token=False)

    def per_token(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """Compile a frame of calls with one slot a token."""
        return self._compile(gm, examples, per_token=True)

    def _compile(
        self, gm: fx.GraphModule, examples: Sequence[Any], *, per_token: bool
    ) -> Callable[..., Any]:
        program = self.program
        frame = Frame.of(program, gm.graph, examples)
        lora = program.runtime.active and frame.carries_lora
        self.several_graphs |= frame.follows_another
        frame.per_token = per_token
        title = f"graph {len(self.records)}{' lora' if lora else ' base'}"
        title += " per token" if per_token else ""
        record = GraphRecord(title, lora, GraphDump(title, dump_folder(program.options)))
        with progress(f"compiling {title}"):
            if not program.runtime.active:
                record.dump.graph("captured", gm)
                executable = self.lowering.base(gm, examples)
            else:
                compiler = _FrameCompiler(self, frame, record)
                executable = aot_autograd(
                    fw_compiler=compiler,
                    inference_compiler=compiler,
                    decompositions=self.lowering.decompositions(),
                )(gm, examples)
                executable = _handing_over(self, record, executable)
        self.records.append(record)
        return executable


class _FrameCompiler:
    """AOTAutograd's inference compiler for one frame."""

    def __init__(self, backend: Backend, frame: Frame, record: GraphRecord) -> None:
        self.backend = backend
        self.frame = frame
        self.record = record

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program, record = self.backend.program, self.record
        self.frame.bind(gm.graph)
        ctx = Context(program, self.frame, gm, edits_left=program.options.max_edits)
        numeric = NumericCheck(record.title) if program.options.verify == "numeric" else None
        record.passes = run_pipeline(gm, ctx, record.dump, numeric.keep if numeric else None)
        for kernel in sorted(ctx.kernels):
            record.dump.source(f"kernel-{kernel:x}.py", source_of(kernel))
        for key, states in enumerate(ctx.states.values()):
            for state in states:
                state.node_key = key
                # Nodes would hold the whole graph alive.
                state.use = state.packed_weight = state.packed_bias = None
            record.states.extend(states)
        record.refusals = ctx.refusals
        record.handover = ctx.handover
        extra = list(self.frame.extra_nodes)
        values = [node.meta["val"] for node in self.frame.extra_nodes.values()]
        executable = self.backend.lowering.compile(gm, [*inputs, *values])
        nulls = [
            torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            if name not in ("slot", "slots")
            else None
            for (_, _, name), value in zip(extra, values, strict=True)
        ]
        record.inside = self.frame.inside
        return _executable(program, record, executable, extra, nulls, numeric)


def _handing_over(
    backend: Backend, record: GraphRecord, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The graph among others of one call: what it takes is checked, what it returns is noted."""
    program, handover = backend.program, record.handover

    def run(*arguments: Any) -> Any:
        call = program.call
        if call is None or not (backend.several_graphs or handover.fresh):
            return compiled(*arguments)
        holds = handover.holds(call.ledger, arguments)
        if not holds and not program.runtime.uniform:
            record.refuse_changed(program)
        results = compiled(*arguments)
        handover.note(call.ledger, arguments, results, known=holds)
        handover.fresh = False
        return results

    return run


def _executable(
    program: Program,
    record: GraphRecord,
    compiled: Callable[[list[Any]], Any],
    extra: Sequence[tuple[int, int, str]],
    nulls: Sequence[Tensor | None],
    numeric: NumericCheck | None,
) -> Callable[..., Any]:
    """The compiled graph behind the checks of each call, in AOTAutograd's boxed convention."""

    def run(arguments: list[Any]) -> Any:
        if record.refusals:
            record.check(program)
        if record.inside:
            _check_callers(program, arguments, record.inside)
        if extra:
            arguments.extend(_looked_up(program, arguments, extra, nulls))
        if numeric is not None and numeric.stages:
            numeric.run(arguments, mixed=not program.runtime.uniform)
        return compiled(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _check_callers(
    program: Program, arguments: Sequence[Any], inside: Mapping[tuple[int, int], bool]
) -> None:
    """The graph's unmarked uses are inside or outside of their modules' calls, as when captured.

    Raises:
        MatchError: they are not: a delta would be added twice, or not at all.
    """
    callers = calling_modules()
    for (position, index), expected in inside.items():
        site = program.site_of_weight(arguments[position], index)
        if site is None or (id(site.module) in callers) == expected:
            continue
        if program.is_touched(site):
            raise MatchError(
                f"{site.path}: its forward is called by itself and through its module, in "
                "graphs that breaks keep apart; call the module, or use exclude_modules"
            )


def _looked_up(
    program: Program,
    arguments: Sequence[Any],
    extra: Sequence[tuple[int, int, str]],
    nulls: Sequence[Tensor | None],
) -> list[Any]:
    """The inputs that `match` added, found by the weight that stands at their position.

    A layer whose weight carries no site gets a bank of rank zero.
    """
    found: list[Any] = []
    for (position, index, name), null in zip(extra, nulls, strict=True):
        if name == "slots":
            found.append(program.runtime.slots)
        elif name == "slot":
            found.append(program.runtime.slots[:1])
        else:
            bank = program.bank_of_weight(arguments[position], index)
            found.append(null if bank is None else getattr(bank, name))
    return found


def seen_sites(records: Sequence[GraphRecord]) -> set[Site]:
    """The sites that some graph serves or refuses."""
    found = {state.site for record in records for state in record.states}
    found.update(site for record in records for item in record.refusals for site in item.sites)
    return found
