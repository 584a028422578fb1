"""The Dynamo backend of a program: compiles captured frames to executables.

Frames of calls without adapters are compiled like the base model's. All others go through
AOTAutograd, the passes and the lowering, even if they have no site, since proofs of later graphs
may need their results' owners. A graph serves calls of the kind for which it was captured.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from torch import fx

from lorafx.capture.checks import Checks
from lorafx.capture.compilation import Compilation, Observer
from lorafx.capture.compile_log import (
    form_of,
    reason,
    show,
    tell,
    timed,
    tracing_seconds,
)
from lorafx.capture.compiler_failures import KEEP_OUT, failing_in
from lorafx.capture.driver import AfterPass, NumericCheck, run_passes
from lorafx.capture.executable import (
    Lowered,
    by_operator_if_tracked,
    checked,
    for_base,
    with_lookups,
)
from lorafx.capture.lowering import InductorLowering, Lowering, compile_base, lowering_for
from lorafx.capture.needless_guards import keep_guards
from lorafx.capture.record import GraphRecord
from lorafx.capture.watched_places import KIND, WatchedPlaces
from lorafx.errors import CaptureError, LoweringError
from lorafx.kernels.cpu.delta_kernels import builds_noted, built_source
from lorafx.kernels.triton.build import source_of
from lorafx.pass_order import CAPTURED, TRACED, Pipeline, pipeline
from lorafx.passes.fold import undo
from lorafx.passes.unfold import can_unfold
from lorafx.placements import is_placed
from lorafx.program.attention_nodes import writes_caches
from lorafx.program.context import Context
from lorafx.program.frame import LOOKED_UP, PER_REQUEST, Frame, SlotForm
from lorafx.program.program import PassReport, Program
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
        lowering: by default that of the program's options.
        observers: see what is compiled.
        records: of graphs that were compiled before.
    """

    def __init__(
        self,
        program: Program,
        entered: Callable[[FrameType], bool],
        *,
        lowering: Lowering | None = None,
        observers: Iterable[Observer] = (),
        records: Iterable[GraphRecord] = (),
    ) -> None:
        self.program = program
        self.owner = weakref.ref(program)
        self.entered = entered
        self.records = [*records]
        self.lowering = lowering or lowering_for(program.options)
        self._observers = [*observers]
        self._shortcuts = chosen(program.options.shortcuts)
        #: Looks up a place of the captured frame, if only this program runs the frame's code.
        self._value_at: Callable[[str], Any] | None = None
        #: Places of the captured frame that stand for guards; None where Dynamo compares them all.
        self._watched: WatchedPlaces | None = None

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Inside the block `observer` sees what is compiled, too."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    def __call__(
        self, gm: fx.GraphModule, examples: Sequence[Any], *, slots: SlotForm = PER_REQUEST
    ) -> Callable[..., Any]:
        """The executable of a frame, for Dynamo. Arguments and errors are those of `compile`."""
        return self.compile(gm, examples, slots=slots).executable

    def compile(
        self, gm: fx.GraphModule, examples: Sequence[Any], *, slots: SlotForm = PER_REQUEST
    ) -> Compilation:
        """Compile a frame whose inputs are `examples`. Raises ReplacedModuleError, and keeps no
        graph, if an adapter of the batch touches a replaced module."""
        program, self._value_at, self._watched = self.program, None, None
        traced = tracing_seconds()
        inductor = isinstance(self.lowering, InductorLowering)
        on_cpu = program.runtime.device.type == "cpu"
        if inductor and on_cpu and "compiler_ahead" in self._shortcuts:
            from lorafx.torch_internals.cpp import ask_compiler

            ask_compiler()
        frame = self._new_frame(gm, examples)
        frame.slots = slots
        active = bool(program.runtime.active)
        is_entry = frame.begins_call and not program.site_watch.missing
        call = form_of(program, frame)
        record = self._new_record(frame, examples, call)
        record.seconds["Dynamo"] = traced
        compilation = self._observed(gm, examples, frame, record)
        if not self._keeps_stages:
            record.stages = []
        self._guard_kind(frame, active=active)
        if is_entry and "needless_guards" in self._shortcuts:
            self._value_at = names_of_frame()  # for guards, which Dynamo makes later
            owner, f_globals = map(self._value_at, ("L['self']", "G"))
            self._watched = WatchedPlaces(owner, f_globals, places_in_order())
            self._watched.guard(partial(guard_frame, kind=KIND))
        return compilation

    @property
    def _keeps_stages(self) -> bool:
        return self.lowering.replays or any(item.keeps_stages for item in self._observers)

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
        title += " per token" if frame.slots.per_token else ""
        changed = "".join(places.change() for places in program.watched_places[-1:])
        why = reason(call, [record.form for record in self.records], changed)
        keeps = self._keeps_stages or program.options.verify == "numeric"
        return GraphRecord(title, lora, checks, keeps, form=call, reason=why)

    def _observed(
        self, gm: fx.GraphModule, examples: Sequence[Any], frame: Frame, record: GraphRecord
    ) -> Compilation:
        program = self.program
        active, model = bool(program.runtime.active), type(program.model).__name__
        compile_graph = self._compile_lora if active else self._compile_base
        # A rank's graph may hold numbers of its own, such as its first row of a vocabulary.
        whole = not program.site_watch.missing and not any(map(is_placed, examples))
        sources = _sources(gm)
        with ExitStack() as observed:
            for observer in self._observers:
                observed.enter_context(observer.compiling(record))
            show(f"{record.title} of {model}, {record.reason}")
            self._rewrite_traced(gm, frame, record)
            executable, lowered = compile_graph(gm, examples, frame, record)
            whole &= lowered is None or lowered.whole
            compilation = Compilation(
                record, frame, sources, executable, lowered, base=not active, whole=whole
            )
            self.records.append(record)
            for observer in self._observers:
                observer.compiled(compilation)
            tell(record, model)
        return compilation

    def _after(self, record: GraphRecord) -> AfterPass:
        def after(gm: fx.GraphModule, ctx: Context, done: PassReport | str) -> None:
            record.after(gm, ctx, done)
            for observer in self._observers:
                observer.after(gm, ctx, done)

        return after

    def _new_frame(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Frame:
        program = self.program
        program.look_at_modules()
        program.refuse_missing(program.batch.touched if program.runtime.active else ())
        frame = program.frame(gm.graph, examples)
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
        kept: Sequence[bool] = [True] * len(guards)
        if value_at is not None and self._watched is not None:
            kept = keep_guards(guards, value_at, self.program.weight_watch.holds)
            pairs = [*zip(guards, kept, strict=True)]
            self._watched.watch(guard.orig_guard for guard, keep in pairs if keep)
            self.program.watched_places.append(self._watched)
            there = set(map(id, self._watched.guards))
            kept = [keep and id(guard.orig_guard) not in there for guard, keep in pairs]
        watched = [] if self._watched is None else self._watched.guards
        for observer in self._observers:
            observer.guarded(guards, kept, watched)
        return kept

    def _rewrite_traced(self, gm: fx.GraphModule, frame: Frame, record: GraphRecord) -> None:
        """Run DYNAMO_PASSES."""
        frame.bind(gm.graph)
        ctx, after = Context(self.program, frame, gm), self._after(record)
        after(gm, ctx, TRACED)
        run_passes(pipeline(self.program.options).dynamo, gm, ctx, after, aten=False)

    def _compile_base(
        self, gm: fx.GraphModule, examples: Sequence[Any], frame: Frame, record: GraphRecord
    ) -> tuple[Callable[..., Any], None]:
        with self._lowering_timed(record):
            compiled = compile_base(self.lowering, gm, examples)
        return for_base(record.checks, self.owner, compiled), None

    def _compile_lora(
        self, gm: fx.GraphModule, examples: Sequence[Any], frame: Frame, record: GraphRecord
    ) -> tuple[Callable[..., Any], Lowered]:
        passes, lowered = pipeline(self.program.options), list[Lowered]()

        def compiler(traced: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            if frame.folded and not can_unfold(traced.graph):
                return traced  # it is traced again
            lowered.append(self._run_passes_and_lower(traced, inputs, frame, record, passes))
            check = None
            if self.program.options.verify == "numeric":
                check = NumericCheck(record.title, passes.graph, record.stages)
            return with_lookups(record.checks, self.owner, lowered[-1], check)

        trace = aot_autograd(
            fw_compiler=_refuse_derivatives,
            inference_compiler=compiler,
            decompositions=self.lowering.decompositions(),
            # Otherwise AOTAutograd returns a written input, and copies all of it back.
            keep_inference_input_mutations=writes_caches(gm),
        )
        with (
            saved_tensors_hooks_kept(),
            failing_in("AOTAutograd", CaptureError, KEEP_OUT),
            timed(record.seconds, "AOTAutograd"),
        ):
            try:
                compiled = trace(gm, examples)
            except Exception:
                if not frame.folded:
                    raise
            if frame.folded:  # layers cannot be left out, or the error may be about their ops
                undo(gm, frame)
                compiled = trace(gm, examples)
        return checked(record.checks, self.owner, compiled), lowered[-1]

    def _run_passes_and_lower(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        frame: Frame,
        record: GraphRecord,
        passes: Pipeline,
    ) -> Lowered:
        frame.bind(gm.graph)
        ctx, after = Context(self.program, frame, gm), self._after(record)
        replays = self.lowering.replays
        with timed(record.seconds, "passes"), builds_noted() as built:
            run_passes(passes.aot, gm, ctx, lambda gm, ctx, done: record.report(done))
            frame.folded = []
            after(gm, ctx, CAPTURED)
            run_passes(passes.graph, gm, ctx, after)
        for kernel in sorted(ctx.kernels):
            record.sources[f"kernel-{kernel:x}.py"] = partial(source_of, kernel)
        for spec, kernel in built.items():
            record.sources[f"kernel-{kernel:x}.cpp"] = partial(built_source, spec)
        record.note(ctx)
        extra = list(frame.extra_nodes)
        values = [node.meta["val"] for node in frame.extra_nodes.values()]
        operators = copy.deepcopy(gm) if ctx.handover.seen and not replays else None
        with self._lowering_timed(record):
            if not replays:
                run_passes(passes.lowering, gm, ctx, after, aten=False)
            run = self.lowering.compile(gm, [*inputs, *values], record.stages)
        if operators is not None:
            run = by_operator_if_tracked(run, operators)
        banks = [
            None if name in LOOKED_UP else (tuple(value.shape), value.stride(), value.dtype)
            for (_, _, name), value in zip(extra, values, strict=True)
        ]
        return Lowered(run, extra, banks, whole=operators is None)

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


def _sources(gm: fx.GraphModule) -> list[Any]:
    """Dynamo's sources of the inputs of its graph."""
    graph_args = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return [getattr(item, "source", None) for item in graph_args]
