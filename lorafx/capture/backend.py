"""The Dynamo backend of a program: compiles captured frames to executables.

Frames of calls without adapters are compiled like the base model's. All others go through
AOTAutograd, the passes and the lowering, even if they have no site, since proofs of later graphs
may need their results' owners. A graph serves calls of the kind for which it was captured.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor, fx

from lorafx.capture.checks import Checks
from lorafx.capture.compile_log import (
    form_of,
    reason,
    show,
    tell,
    timed,
    tracing_seconds,
)
from lorafx.capture.compiler_failures import KEEP_OUT, failing_in
from lorafx.capture.driver import NumericCheck, run_pipeline
from lorafx.capture.executable import (
    Captured,
    Parts,
    by_operator_if_tracked,
    checked,
    collecting_parts,
    for_base,
    foreign_operators,
    with_lookups,
)
from lorafx.capture.lookups import check_lookups
from lorafx.capture.lowering import Lowering, compile_base, lowering_for
from lorafx.capture.needless_guards import keep_guards
from lorafx.capture.record import GraphRecord
from lorafx.capture.watched_places import KIND, WatchedPlaces
from lorafx.config import dump_folder
from lorafx.errors import CaptureError, LoweringError
from lorafx.kernels.cpu.delta_kernels import builds_noted, built_source
from lorafx.kernels.triton.build import source_of
from lorafx.pass_order import pipeline
from lorafx.placements import is_placed
from lorafx.program.attention_nodes import writes_caches
from lorafx.program.context import Context
from lorafx.program.frame import ONE_SLOT, SLOTS, Frame
from lorafx.program.program import Program
from lorafx.program.stack import called_directly
from lorafx.torch_internals.aot_autograd import aot_autograd
from lorafx.torch_internals.frames import (
    ends_in_break,
    guard_frame,
    guarded_attributes,
    names_of_frame,
    places_in_order,
)
from lorafx.torch_internals.shortcuts import chosen
from lorafx.torch_internals.transforms import saved_tensors_hooks_kept


class Backend:
    """Compiles the frames of a program.

    Args:
        entered: says whether a Python frame is one that calls the program with a call's arguments.
    """

    def __init__(self, program: Program, entered: Callable[[FrameType], bool]) -> None:
        self.program = program
        self.owner = weakref.ref(program)
        self.entered = entered
        self.records: list[GraphRecord] = []
        #: Receives each compiled graph, to save it.
        self.noted: Callable[[Captured], None] | None = None
        #: Receives the record of each graph, even of a failed compilation.
        self.recorded: Callable[[GraphRecord], None] | None = None
        self.lowering: Lowering = lowering_for(program.options)
        self.shortcuts = chosen(program.options.shortcuts)
        #: Replaces the lowering: makes the executable from a record, whose stages are kept.
        self.replay: Callable[[GraphRecord], Callable[[list[Any]], Any]] | None = None
        #: Looks up a place of the captured frame, if only this program runs the frame's code.
        self._value_at: Callable[[str], Any] | None = None
        #: Places of the captured frame that stand for guards; None where Dynamo compares them all.
        self.watched: WatchedPlaces | None = None

    def per_token(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return self(gm, examples, per_token=True)

    def __call__(
        self, gm: fx.GraphModule, examples: Sequence[Any], *, per_token: bool = False
    ) -> Callable[..., Any]:
        """The executable of a frame whose inputs are `examples`. Raises ReplacedModuleError, and
        keeps no graph, if an adapter of the batch touches a replaced module."""
        program, self._value_at, self.watched = self.program, None, None
        traced = tracing_seconds()
        frame = self._new_frame(gm, examples, per_token=per_token)
        active = bool(program.runtime.active)
        is_entry = frame.begins_call and not program.site_watch.missing
        call = form_of(program, begins_call=frame.begins_call, per_token=per_token)
        record = self._new_record(frame, examples, call)
        record.seconds["Dynamo"] = traced
        # A rank's graph may hold numbers of its own, such as its first row of a vocabulary.
        whole = not program.site_watch.missing and not any(map(is_placed, examples))
        parts = Parts(record.checks, base=not active, whole=whole)
        graph = Captured(record, frame, _sources(gm), parts)
        executable = self._compile(gm, examples, graph)
        self._guard_kind(frame, active=active)
        if is_entry and "needless_guards" in self.shortcuts:
            self._value_at = names_of_frame()  # for guards, which Dynamo makes later
            owner, f_globals = map(self._value_at, ("L['self']", "G"))
            self.watched = WatchedPlaces(owner, f_globals, places_in_order())
            self.watched.guard(partial(guard_frame, kind=KIND))
        return executable

    def _new_record(
        self,
        frame: Frame,
        examples: Sequence[Any],
        call: Mapping[str, str],
    ) -> GraphRecord:
        program = self.program
        checks = Checks.of(frame, examples)
        program.in_pieces |= frame.follows_another or bool(checks.arguments) or ends_in_break()
        lora = bool(program.runtime.active) and frame.carries_lora
        title = f"graph {len(self.records)} {'lora' if lora else 'base'}"
        title += " per token" if frame.per_token else ""
        changed = "".join(places.change() for places in program.watched_places[-1:])
        why = reason(call, [record.form for record in self.records], changed)
        numeric, dumps = program.options.verify == "numeric", dump_folder(program.options)
        keeps = self.replay is not None or numeric or dumps is not None
        return GraphRecord(title, lora, checks, keeps, form=call, reason=why)

    def _compile(
        self, gm: fx.GraphModule, examples: Sequence[Any], graph: Captured
    ) -> Callable[..., Any]:
        program, record = self.program, graph.record
        active = bool(program.runtime.active)
        check_lookups(gm, graph.frame)
        model = type(program.model).__name__
        noting = nullcontext() if self.noted is None else collecting_parts(graph.parts, gm)
        compile_graph = self._compile_lora if active else self._compile_base
        try:
            show(f"{record.title} of {model}, {record.reason}")
            with noting:
                executable = compile_graph(gm, examples, graph)
            self.records.append(record)
            if self.noted is not None:
                self.noted(graph)
            tell(record, model)
        finally:
            if self.recorded is not None:
                self.recorded(record)
        if self.replay is None and dump_folder(program.options) is None:
            record.stages = []
        return executable

    def _new_frame(self, gm: fx.GraphModule, examples: Sequence[Any], *, per_token: bool) -> Frame:
        program = self.program
        program.look_at_modules()
        program.refuse_missing(program.batch.touched if program.runtime.active else ())
        frame = program.frame(gm.graph, examples)
        frame.per_token = per_token
        frame.begins_call = called_directly(self.entered)
        return frame

    def _guard_kind(self, frame: Frame, *, active: bool) -> None:
        """Guard the kind of call, unless the entry or a mark's guard does, and missing modules."""
        program = self.program
        value_at, state = names_of_frame(), program.site_watch.state
        kind_is_guarded = frame.begins_call or any(
            value_at(name.removesuffix(".active")) is program.runtime
            for name in guarded_attributes(".runtime.active")
        )
        if kind_is_guarded and not state:
            return
        program_of = weakref.ref(program)  # Dynamo never frees some guards

        def holds(_: Any) -> bool:
            program = program_of()
            if program is None or not (kind_is_guarded or bool(program.runtime.active) is active):
                return False
            if not (state and program.runtime.active):
                return True
            program.look_at_modules()
            watch = program.site_watch
            return watch.state == state and not watch.missing & program.batch.touched

        guard_frame(holds)

    def keep_guards(self, guards: Sequence[Any]) -> Sequence[bool]:
        value_at, self._value_at = self._value_at, None
        if value_at is None or self.watched is None:
            return [True] * len(guards)
        kept = keep_guards(guards, value_at, self.program.weight_watch.holds)
        self.watched.watch(g.orig_guard for g, keep in zip(guards, kept, strict=True) if keep)
        self.program.watched_places.append(self.watched)
        watched = set(map(id, self.watched.guards))
        return [
            keep and id(g.orig_guard) not in watched for g, keep in zip(guards, kept, strict=True)
        ]

    def _compile_base(
        self, gm: fx.GraphModule, examples: Sequence[Any], graph: Captured
    ) -> Callable[..., Any]:
        record = graph.record
        record.keep_base(gm, graph.frame)
        with self._lowering_timed(record):
            compiled = compile_base(self.lowering, gm, examples)
        return for_base(record.checks, self.owner, compiled)

    def _compile_lora(
        self, gm: fx.GraphModule, examples: Sequence[Any], graph: Captured
    ) -> Callable[..., Any]:
        record = graph.record

        def compiler(traced: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return self._run_passes_and_lower(traced, inputs, graph)

        trace = aot_autograd(
            fw_compiler=_refuse_derivatives,
            inference_compiler=compiler,
            decompositions=self.lowering.decompositions(),
            # Otherwise AOTAutograd returns a written input, and copies all of it back.
            keep_inference_input_mutations=writes_caches(gm),
        )
        if graph.frame.begins_call and not ends_in_break():  # nothing is differentiated after it
            _detach_results(gm)
        with (
            saved_tensors_hooks_kept(),
            failing_in("AOTAutograd", CaptureError, KEEP_OUT),
            timed(record.seconds, "AOTAutograd"),
        ):
            compiled = trace(gm, examples)
        return checked(record.checks, self.owner, compiled)

    def _run_passes_and_lower(
        self, gm: fx.GraphModule, inputs: Sequence[Any], graph: Captured
    ) -> Callable[..., Any]:
        program, record, frame, parts = self.program, graph.record, graph.frame, graph.parts
        if self.noted is not None:
            parts.foreign += foreign_operators(gm)
        frame.bind(gm.graph)
        ctx = Context(program, frame, gm)
        # The rows of a graph inside a call may be some of the batch's, in another order: it looks
        # their slots up. Slots per token are in the order of the call's arguments.
        if not (frame.begins_call or frame.per_token):
            ctx.look_up_slots()
        with timed(record.seconds, "passes"), builds_noted() as built:
            run_pipeline(gm, ctx, record.after)
        for kernel in sorted(ctx.kernels):
            record.sources[f"kernel-{kernel:x}.py"] = partial(source_of, kernel)
        for spec, kernel in built.items():
            record.sources[f"kernel-{kernel:x}.cpp"] = partial(built_source, spec)
        record.note(ctx)
        extra = list(frame.extra_nodes)
        values = [node.meta["val"] for node in frame.extra_nodes.values()]
        operators = None
        if self.replay is not None:
            executable = self.replay(record)
        else:
            operators = copy.deepcopy(gm) if ctx.handover.seen else None
            with self._lowering_timed(record):
                executable = self.lowering.compile(gm, [*inputs, *values])
        parts.lowered, parts.extra = executable, extra
        parts.whole &= operators is None
        if operators is not None:
            executable = by_operator_if_tracked(executable, operators)
        parts.banks = [
            None if name in (SLOTS, ONE_SLOT) else (tuple(value.shape), value.stride(), value.dtype)
            for (_, _, name), value in zip(extra, values, strict=True)
        ]
        check = None
        if program.options.verify == "numeric":
            check = NumericCheck(record.title, pipeline(program.options).graph, record.stages)
        return with_lookups(record.checks, self.owner, executable, extra, parts.banks, check)

    @contextmanager
    def _lowering_timed(self, record: GraphRecord) -> Iterator[None]:
        name = self.program.options.lowering
        code: AbstractContextManager[None] = nullcontext()
        way_out = KEEP_OUT
        if name != "reference":
            from lorafx.torch_internals.inductor import code_noted

            code = code_noted(record.code)
            way_out = 'run the graphs node by node by Options(lowering="reference")'
        failing = failing_in(f"the lowering {name!r}", LoweringError, way_out)
        with failing, timed(record.seconds, name), code:
            yield


def _refuse_derivatives(gm: fx.GraphModule, _: Sequence[Any]) -> NoReturn:
    """Raise CaptureError for a graph whose results are to be differentiated after it."""
    raise CaptureError(
        "the forward computes derivatives by torch.autograd of what a graph has returned, and "
        "graphs with adapters have no backward. Use torch.func (grad, vjp, jvp, jacrev, hessian), "
        "or keep torch.autograd.grad and what it differentiates in one graph, without a break"
    )


def _detach_results(gm: fx.GraphModule) -> None:
    """Detach the results of Dynamo's graph that gradients could reach."""
    for node in gm.graph.output_node().all_input_nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" or not isinstance(value, Tensor) or not value.requires_grad:
            continue
        with gm.graph.inserting_before(gm.graph.output_node()):
            detached = gm.graph.call_method("detach", (node,))
        detached.meta = dict(node.meta)
        gm.graph.output_node().replace_input_with(node, detached)
    gm.recompile()


def _sources(gm: fx.GraphModule) -> list[Any]:
    """Dynamo's sources of the inputs of its graph."""
    graph_args = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return [getattr(item, "source", None) for item in graph_args]
