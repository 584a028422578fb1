"""The Dynamo backend of one program: a captured frame goes in, an executable comes out.

Without an active adapter a frame is compiled exactly as the base model would be. With one it goes
through AOTAutograd to the functional ATen graph, the passes, and the lowering; so do parts without
sites, since the proof of a later graph may rest on the row ownership of their results. A frame
without marks is compiled both ways where no guard of Dynamo distinguishes the two kinds of call: an
entry's own frame belongs to one kind (lorafx.serving.entry), what a model breaks into does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from torch import fx

from lorafx.capture.bound_inputs import BoundInputs, bind, take_out
from lorafx.capture.checks import Checks, InputPlaces
from lorafx.capture.driver import AfterPass, run_pipeline
from lorafx.capture.dump import GraphDump, beside_compiling, own_folder, traced
from lorafx.capture.executable import (
    ProgramLookup,
    by_activity,
    checked,
    for_base,
    looked_at,
    while_missing,
    with_lookups,
)
from lorafx.capture.failures import in_lowering, in_tracing
from lorafx.capture.instances import Form, Instances
from lorafx.capture.lookup_search import LookupSearch
from lorafx.capture.lowering import InductorLowering, Lowering, lowering_for
from lorafx.capture.needless_guards import keep_guards
from lorafx.capture.parts import Captured, Parts, foreign_operators, noted
from lorafx.capture.record import GraphRecord
from lorafx.capture.stamps import Folded, fold, refused_by_stamps, unfold
from lorafx.capture.told import form_of, note_tracing, reason, shown, tell, tell_instance, timed
from lorafx.capture.verify import NumericCheck
from lorafx.graph.context import Context
from lorafx.kernels.cpu.cpu import builds_noted, built_source
from lorafx.kernels.triton.triton_build import source_of
from lorafx.passes.write_in_place import writes_in_place
from lorafx.program.frame import ONE_SLOT, SLOTS, Frame
from lorafx.program.program import Program
from lorafx.program.stack import called_directly
from lorafx.torch_internals.aot_autograd import aot_autograd
from lorafx.torch_internals.frames import (
    duck_shaped,
    ends_in_break,
    guarded_attributes,
    named_by_dynamo,
    names_of_frame,
)
from lorafx.torch_internals.shortcuts import chosen, gave_up
from lorafx.viewer.page import Page
from lorafx.viewer.stages import Span


@dataclass(frozen=True)
class Compilation:
    """One graph on its way to an executable.

    Attributes:
        frame: what Dynamo captured.
        record: what `explain` and `dump` will show of it.
        owner: finds the program that the executable serves.
        lowering: compiles the graph.
        parts: of the executable, filled in on the way.
    """

    frame: Frame
    record: GraphRecord
    owner: ProgramLookup
    lowering: Lowering
    parts: Parts


class Backend:
    """Compiles the frames of one program.

    Args:
        entered: true for a Python frame that calls the program with a call's arguments.

    Attributes:
        split_by_host: functions that such a frame calls have one code object for calls with
            adapters, and another for those without.
    """

    split_by_host = True

    def __init__(self, program: Program, entered: Callable[[FrameType], bool]) -> None:
        self.program = program
        self.entered = entered
        self.records: list[GraphRecord] = []
        #: Dynamo may call this program's graphs for other models.
        self.shares_graphs = False
        #: Some graph takes what another made: results are worth keeping note of.
        self.several = [False]
        #: Is given each graph that was compiled, while somebody wants to save it.
        self.noted: Callable[[Captured], None] | None = None
        #: Is called after each graph that was compiled.
        self.recorded: Callable[[], None] | None = None
        #: The viewer's page, where graphs are dumped as they come.
        self.page: Page | None = None
        self.lowering: Lowering = lowering_for(program.options)
        self.shortcuts = chosen(program.options.shortcuts)
        #: Gives what is told of each pass over a graph; None where nobody wants to know.
        self.keeper: Callable[[Context], AfterPass] | None = None
        #: Finds what a place of the frame that is being captured holds, where the frame is the
        #: program's own in every call.
        self._at: Callable[[str], Any] | None = None
        #: Graphs that may serve calls of other sizes.
        self.instances = Instances()

    def finds_instances(self, active: bool) -> bool:
        """Whether a graph may serve calls of other sizes than it was captured for. Triton kernels
        are planned for their rows; what torch.compile makes of the base for one request may differ
        in bits; a graph that is looked at, or saved, is one of its own."""
        options, device = self.program.options, self.program.runtime.device
        if self.noted is not None or self.keeper is not None or self.shares_graphs:
            return False
        if device.type != "cpu" or options.lowering == "triton" or options.verify == "numeric":
            return False
        return active or options.lowering == "reference"

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """Compile a frame of calls with one slot a request."""
        return self.compile(gm, examples, self.lowering)

    def per_token(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """Compile a frame of calls with one slot a token."""
        return self.compile(gm, examples, self.lowering, per_token=True)

    def compile(
        self,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        lowering: Lowering,
        *,
        per_token: bool = False,
    ) -> Callable[..., Any]:
        """The executable of a frame whose inputs are `examples`.

        Raises:
            ReplacedModuleError: a module that carries an adapter of the batch. No graph is kept
                then, and Dynamo asks again in the next call.
        """
        program, self._at = self.program, None
        spans: list[Span] = []
        note_tracing(spans)
        program.look_at_modules()
        program.refuse_missing(program.batch.touched if program.runtime.active else ())
        frame = program.frame(gm.graph, examples)
        frame.per_token = per_token
        frame.begins_call = called_directly(self.entered)
        frame.duck_shaped = duck_shaped()
        active = bool(program.runtime.active)
        if not self.records:
            for index, report in enumerate(program.prepared):
                traced(f"model_{index:02d}_{report.name}", partial(str, report))
        split = self.split_by_host and frame.begins_call
        both = not split and not _guarded_on_activity(program)
        own = not both and not program.site_watch.missing and self.owns(frame)
        bound, graph = None, gm.graph
        if active and own:
            bound, examples = bind(program, frame, gm, examples)
        asked = form_of(program, begins_call=frame.begins_call, per_token=per_token)
        form = None
        if own and self.finds_instances(active):
            form = Form.of(gm.graph, examples, (active, per_token))
        count = len(examples) - (0 if bound is None else bound.count)
        earlier = None if form is None else self.instances.find(form, count)
        if earlier is not None:
            title, executable = earlier
            if bound is not None:
                take_out(gm, graph, bound.tensors(program))
            self.drop_guards(bound)
            tell_instance(title, type(program.model).__name__, asked, spans)
            return executable
        begun = self.instances.begin()
        values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
        places = InputPlaces.of(frame, examples, shared=self.shares_graphs)
        self.several[0] |= frame.follows_another or bool(places.arguments) or ends_in_break()
        owner = self.owner(frame, [p for p, item in enumerate(frame.inputs) if item.sites])
        lora = (both or active) and frame.carries_lora
        title = f"graph {len(self.records)}{' lora' if lora else ' base'}"
        title += " per token" if per_token else ""
        dump = GraphDump(title, own_folder(program))
        checks = Checks(places, frame.begins_call, self.several)
        why = reason(asked, [record.form for record in self.records])
        record = GraphRecord(title, lora, dump, checks, form=asked, reason=why, spans=spans)
        search = LookupSearch(graph, frame)
        if isinstance(lowering, InductorLowering):
            search.check_inside(gm)
        parts, sources = Parts(checks, bound=bound, lookups=search.lookups), []
        if self.noted is not None:  # before the graph is compiled, which may change it
            parts.foreign = foreign_operators(gm)
            inputs = gm.graph.find_nodes(op="placeholder")
            sources = [getattr(node.meta.get("grapharg"), "source", None) for node in inputs]
        compilation = Compilation(frame, record, owner, lowering, parts)
        with shown(f"{title} of {type(program.model).__name__}, {why}"), self.paged(record):
            if both:
                # Whatever compiles a graph may change it.
                with self.lowering_timed(record):
                    base = lowering.base(copy.deepcopy(gm), examples)
                with_lora = self.compile_lora(gm, examples, compilation)
                executable = parts.lookups.around(by_activity(owner, base, with_lora))
            elif active:
                executable = self.compile_lora(gm, examples, compilation)
                executable = parts.lookups.around(executable)
                if bound is not None:
                    executable = bound.around(program, executable)
                    take_out(gm, graph, bound.tensors(program))
            else:
                dump.add_base(gm, frame)
                noting = nullcontext() if self.noted is None else noted(parts)
                parts.base = True
                with self.lowering_timed(record), noting:
                    executable = lowering.base(gm, examples)
                executable = parts.lookups.around(for_base(checks, owner, executable))
        places.look_once(values)
        if form is not None:
            self.instances.keep(title, form, executable, count, begun)
        if own:
            self.drop_guards(bound)
        self.records.append(record)
        if self.noted is not None:
            alone = not both and not program.site_watch.missing
            self.noted(Captured(record, frame, sources, parts if alone else None))
        tell(record, type(program.model).__name__)
        if self.recorded is not None:
            self.recorded()
        return while_missing(owner, executable) if program.site_watch.missing else executable

    def owns(self, frame: Frame) -> bool:
        """Whether the frame that is being captured is one of this program's in every call."""
        return frame.begins_call  # of an entry's own code

    def drop_guards(self, bound: BoundInputs | None) -> None:
        """Dynamo has not made its guards yet of a frame that is this program's in every call.
        `bound`: the inputs that its graph does not load."""
        self._at = names_of_frame() if "needless_guards" in self.shortcuts else None

    def keep_guards(self, guards: Sequence[Any]) -> Sequence[bool]:
        """Which guards of the graph that was compiled just now are checked before each call, for
        Dynamo."""
        at, self._at = self._at, None
        return [True] * len(guards) if at is None else keep_guards(guards, at)

    def compile_lora(
        self, gm: fx.GraphModule, examples: Sequence[Any], compilation: Compilation
    ) -> Callable[..., Any]:
        """The executable of calls with adapters."""
        record = compilation.record
        compiler = _FrameCompiler(self, compilation)
        compiler.folded = fold(gm) if "stamps" in self.shortcuts else None
        trace = aot_autograd(
            fw_compiler=compiler,
            inference_compiler=compiler,
            decompositions=compilation.lowering.decompositions(),
            # Else what was written into is a result, and is copied back as a whole.
            keep_inference_input_mutations=writes_in_place(gm),
        )
        noting = nullcontext() if self.noted is None else noted(compilation.parts)
        with in_tracing(), noting, timed(record.spans, "AOTAutograd"):
            try:
                executable = trace(gm, examples)
            except Exception as error:
                reason = refused_by_stamps(error)
                if compiler.folded is None or reason is None:
                    raise
                # Before anything was changed: the unfolded graph is what it always was.
                gave_up("stamps", f"{record.title}: {reason}")
                compiler.folded.restore()
                compiler.folded = None
                executable = trace(gm, examples)
        return checked(record.checks, compilation.owner, executable)

    @contextmanager
    def lowering_timed(self, record: GraphRecord) -> Iterator[None]:
        """Around what the lowering does."""
        name = self.program.options.lowering
        with in_lowering(name), timed(record.spans, name), _code_noted(name, record):
            yield

    @contextmanager
    def paged(self, record: GraphRecord) -> Iterator[None]:
        """Around the compilation of a graph: the viewer's page has it afterwards, also where a
        pass or a compiler has failed."""
        try:
            yield
        finally:
            folder = record.dump.folder
            if folder is not None:
                if self.page is None or self.page.folder != folder:
                    program = self.program
                    name = type(program.model).__name__
                    self.page = Page(folder, name, prepared=program.prepared)
                with beside_compiling(folder):
                    self.page.add(record.view)
                    self.page.write()

    def owner(self, frame: Frame, weights: Sequence[int]) -> ProgramLookup:
        """How an executable of `frame` finds the program that it serves. `weights` are the
        positions of sites' weights among the arguments that it is called with."""
        program = self.program  # no other model shares this backend's graphs
        return lambda arguments: program


def _code_noted(lowering: str, record: GraphRecord) -> AbstractContextManager[None]:
    """Around a lowering: what Inductor writes is noted in the record's dump."""
    if lowering == "reference":
        return nullcontext()
    from lorafx.torch_internals.inductor import code_noted

    return code_noted(record.dump.code)


def _guarded_on_activity(program: Program) -> bool:
    """Whether Dynamo guards the frame that is being captured on the program's being active."""
    names = guarded_attributes(".runtime.active")
    session = program.runtime.session
    if session is None or not session.neighbours:
        return bool(names)
    # Marks of models that share modules with this one may stand there too.
    runtimes = (named_by_dynamo(name.removesuffix(".active")) for name in names)
    return any(runtime is program.runtime for runtime in runtimes)


class _FrameCompiler:
    """AOTAutograd's inference compiler for one frame."""

    def __init__(self, backend: Backend, compilation: Compilation) -> None:
        self.backend = backend
        self.frame = compilation.frame
        self.record = compilation.record
        self.lowering = compilation.lowering
        self.parts = compilation.parts
        #: What stands for layers in the graph that is traced; None where it stands for itself.
        self.folded: Folded | None = None

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program, record, frame = self.backend.program, self.record, self.frame
        if self.folded is not None:
            unfold(gm.graph, self.folded)
            self.folded = None
        if self.backend.noted is not None:
            self.parts.foreign += foreign_operators(gm)
        frame.bind(gm.graph)
        ctx = Context(program, frame, gm, edits_left=program.options.max_edits)
        # Rows of other graphs may be some of the batch's, in another order. That is told per
        # request, so slots per token stay as they are: rows are proved from the call's arguments.
        if program.runtime.by_handle or not (frame.begins_call or frame.per_token):
            ctx.look_up_slots()
        numeric = NumericCheck(record.title) if program.options.verify == "numeric" else None
        record.numeric = numeric
        keep: AfterPass | None = numeric.keep if numeric else None
        if self.backend.keeper is not None:
            keep = self.backend.keeper(ctx)
        with timed(record.spans, "passes"), builds_noted() as built:
            record.passes = run_pipeline(gm, ctx, record.dump, keep)
        for kernel in sorted(ctx.kernels):
            record.dump.source(f"kernel-{kernel:x}.py", partial(source_of, kernel))
        for spec, kernel in built.items():
            record.dump.source(f"kernel-{kernel:x}.cpp", partial(built_source, spec))
        record.note(ctx)
        extra = list(frame.extra_nodes)
        values = [node.meta["val"] for node in frame.extra_nodes.values()]
        # A stage that somebody chooses runs operator by operator as it is.
        staged = self.backend.keeper is not None
        operators = copy.deepcopy(gm) if ctx.handover.seen and not staged else None
        with self.backend.lowering_timed(record):
            executable = self.lowering.compile(gm, [*inputs, *values])
        self.parts.lowered, self.parts.extra = executable, extra
        self.parts.whole = operators is None and numeric is None
        if operators is not None:
            executable = looked_at(executable, operators)
        banks = [
            None if name in (SLOTS, ONE_SLOT) else (tuple(value.shape), value.stride(), value.dtype)
            for (_, _, name), value in zip(extra, values, strict=True)
        ]
        self.parts.banks = banks
        # The parts of a tensor subclass do not say whose they are.
        whole = [node for node, item in frame.by_node.items() if item.sites and not item.part]
        weights = [frame.positions[node] for node in whole]
        owner = self.backend.owner(frame, weights)
        return with_lookups(record.checks, owner, executable, extra, banks, numeric)
