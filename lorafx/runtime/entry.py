"""Entries: a module's forward, or another method, compiled for one program.

Once per call the host finds the number of requests and the slot of each. Then the compiled forward
runs, which reads only tensors: the one with adapters or the base's, depending on the batch and on
`Options.base_graphs`. Each has graphs of its own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lorafx.capture.compiler_failures import explained, lorafx_error_in
from lorafx.capture.missed import Missed, NoGraph
from lorafx.errors import CaptureError, LorafxError, ReplacedModuleError
from lorafx.model.experts import LOOP, loops
from lorafx.model.marks import MARKS
from lorafx.model.replaced_methods import ReplacedMethod
from lorafx.ownership.memory import Memory
from lorafx.ownership.real_labels import MOST_REQUESTS
from lorafx.program.argument_roles import IMAGES, RoleTable
from lorafx.program.frame import PER_REQUEST, SlotForm
from lorafx.program.program import Program
from lorafx.program.refusals import LastingRefusal
from lorafx.program.row_handoff import label_arguments
from lorafx.runtime.call import Choice, ForwardCall
from lorafx.runtime.requests import check_inputs, plain_tokens, refuse_nested
from lorafx.runtime.resting import refuse_elsewhere
from lorafx.runtime.results import refuse_code
from lorafx.runtime.session import Session
from lorafx.torch_internals.compat import is_recompile_limit, mark_fixed_shape
from lorafx.torch_internals.versions import saves_graphs

if TYPE_CHECKING:  # imported where used: with the first graph
    from lorafx.capture.saved_graphs.saved_graphs import SavedGraphs
    from lorafx.capture.traced import Traced
    from lorafx.eager.following import Following
    from lorafx.eager.weight_uses import WeightUses
    from lorafx.runtime.tiers import Tiers


class Entry:
    """The compiled forward of a module, or another method of it (`function`). Users and `generate`
    call it in place of the method."""

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        function: Callable[..., Any],
        name: str = "forward",
        *,
        slots: SlotForm = PER_REQUEST,
        packed: bool = False,
        tiers: Tiers | None = None,
    ) -> None:
        self.session = session
        self.tiers = tiers
        self.module = module
        self.function = function
        self.is_forward = name == "forward"
        self.name = f"the {name} of {type(module).__name__}"
        row_dims = session.program.config.row_dims
        self.roles = RoleTable(module, row_dims, function, packed=packed)
        self.slots = slots
        self.target = _to_trace(session.program, module, function) if self.is_forward else function
        #: Whether calls without an adapter run the base's own graphs; "warmup": as soon as `warmup`
        #: has compiled some.
        self.base_graphs = _base_graphs(session)
        #: Traced functions by `Program.unguarded_state`, and by whether they are the base's; of the
        #: initial state and the last one.
        self.traced: dict[tuple[tuple[int, ...], bool], Traced] = {}
        self.experts = [site for site in session.program.sites if site.expert_weight is not None]
        #: Whether the last call with adapters captured graphs; True before the first.
        self.capturing = True
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        refuse_elsewhere(session)
        if (serve := session.requests.serve) is not None:
            return serve(self, args, kwargs)
        running = session.running.in_forward(session.program.runtime.rows)
        return session.run(running, functools.partial(self._serve, args, kwargs))

    def in_python(self, *args: Any, **kwargs: Any) -> Any:
        """`target`, called in a frame in which a call that does not fit it is told."""
        return self.target(*args, **kwargs)

    def _serve(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        session = self.session
        named = self.roles.bind(args, kwargs) if args else kwargs
        if args and self.roles.by_name(args):  # so that both ways to write a call share a graph
            args, kwargs = (), named
        if not args:
            named = kwargs = plain_tokens(kwargs)
        if self.module is session.program.model and self.is_forward:
            check_inputs(self.roles, named)
        session.set_batch(self.roles, self.roles.spread(named), gates=self.slots.gates)
        _fix_image_sizes(named)
        session.program.pack_watch.check()
        session.program.quantised.settle_again()
        session.program.stored_experts.check()
        runtime = session.program.runtime
        active, warming = bool(runtime.active), session.running.warming
        if active:
            refuse_nested(named)
        warms_base = not active and warming and self.base_graphs == "warmup"
        base = not active and (warms_base or self.base_graphs is True)
        runtime.active = not base
        call = ForwardCall(self, args, kwargs, base)
        tiers = None if warming or session.replays else self.tiers
        if tiers is None and (looping := self.looping):
            raise LastingRefusal(looping, "always", LOOP).error()
        result: Any = None
        for tier in (self.run_graph,) if tiers is None else tiers.of(call):
            if not isinstance(result := tier(call), Missed):
                break
        assert not isinstance(result, Missed), result.reason
        if warms_base:
            self.base_graphs = True
        if active and (self.is_forward or not isinstance(result, nn.Module)):
            refuse_code(result, self.name)  # a module is such as get_decoder's
        return result

    def run_graph(self, call: ForwardCall, conversion: Choice | None = None) -> Any:
        """The model's result by a graph, which is compiled if there is none for the call; or by
        what `conversion` of the traced function makes, which may be `Missed`.

        If adapters are active, uses of weights and the owners of tensors are followed between
        graphs. Raises MatchError if the weight of a touched site was used without its module.
        """
        session, program = self.session, self.session.program
        program.pack_watch.pack()
        state, captured = program.unguarded_state(), None
        traced = self._traced_for(state, base=call.base)
        records = session.backend.records
        run, before = functools.partial(traced.call, *call.args, **call.kwargs), traced.conversion
        try:
            traced.conversion = traced.default if conversion is None else conversion(traced)
            no_grad = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
            with no_grad, session.without_mha_fast_path():
                following = uses = None
                if program.runtime.active:
                    following, uses = self._following()
                    captured = len(records)
                if following is None:
                    return run()
                try:
                    result = following.run(lambda: run())  # a frame here tells a wrong call
                    if uses is not None:
                        following.check(result if program.in_pieces else None)
                    return result
                except Exception:
                    if uses is not None:
                        uses.refuse()
                    raise
        except NoGraph as end:
            captured = None  # nothing ran
            return end.missed
        except BaseException as error:
            inner = lorafx_error_in(error)
            if isinstance(inner, ReplacedModuleError):
                raise inner from None
            failure = self._failure(error, inner, traced, base=call.base)
            if failure is error:
                raise
            raise failure from error
        finally:
            traced.conversion = before
            if captured is not None:
                self.capturing = len(records) != captured
            program.hook_watch.accept_new()
            if program.site_watch.state != state[0]:  # it changed while a graph was captured
                for of_base in (False, True):
                    self.traced.pop((state, of_base), None)

    def _failure(
        self, error: BaseException, inner: LorafxError | None, traced: Traced, *, base: bool
    ) -> BaseException:
        """The error for the caller, where capturing or running a graph raised this one, which
        wraps `inner`."""
        name = type(self.module).__name__
        raised = "; ".join(dict.fromkeys(traced.given_up.values()))
        traced.given_up.clear()
        if is_recompile_limit(error):
            limit = self.session.program.options.recompile_limit
            return CaptureError(
                f"{name} has {limit} graphs, as many as Options.recompile_limit allows, and this "
                f"call needs one more: {error}"
            )
        if raised and isinstance(error, LorafxError):
            # The model's own error is the cause, and the one that the caller can act on.
            return type(error)(
                f"{error}. {name} runs in pieces, because it raised an error when this call was "
                f"traced: {raised}"
            ).naming(*error.settings)
        if isinstance(error, LorafxError):
            return error
        return inner or explained(error, name, self._base_sentence(base=base)) or error

    def _following(self) -> tuple[Following | None, WeightUses | None]:
        """What follows the running call between graphs, if anything has to, and the uses of weights
        that it looks at, if an adapter touches some."""
        from lorafx.eager.following import Following
        from lorafx.eager.weight_uses import WeightUses

        program = self.session.program
        uses, memory = WeightUses(program) if program.batch.touched else None, self._owner_memory()
        return None if uses is None and memory is None else Following(memory, uses), uses

    def _owner_memory(self) -> Memory | None:
        """The memory for owners of what the running call computes; None if no graph needs them,
        since the model is one graph that is captured already."""
        session, program = self.session, self.session.program
        call, rows = program.call, len(program.runtime.rows)
        pieces = program.in_pieces
        trackable = session.requests.tokens is None and rows <= MOST_REQUESTS
        if call is None or call.roles is None or not trackable or not (pieces or self.capturing):
            return None
        call.tracked = True
        label_arguments(call.memory, call.roles, call.named, rows)
        if pieces:
            call.memory.add_shared(program.buffers())
        if program.runtime.uniform:  # what marks read that run between graphs
            call.memory.add_shared([program.runtime.slots])
            for group in program.groups:
                call.memory.add_shared(group.bank.tensors.values())
        return call.memory

    def _base_sentence(self, *, base: bool) -> str:
        """A sentence for errors: how calls without an adapter are served if compiling failed."""
        if base:
            return ""
        if self.base_graphs is True:
            return "Calls without an adapter are served as before"
        return "Options(base_graphs=True) serves calls without an adapter by graphs of their own"

    def _new_traced(self, *, base: bool) -> Traced:
        session = self.session
        backend = session.backend  # and with it what compiles
        from lorafx.capture.traced import Traced

        saved = self._saved_graphs(base=base)
        return Traced(
            self.target,
            functools.partial(_weak_method(backend.__call__), slots=self.slots),
            name=self.name,
            dynamic=session.dynamic,
            recompile_limit=session.program.options.recompile_limit,
            sizes_by_data=lambda: bool(session.program.quantised.sized_by_data),
            keep_guards=backend.keep_guards,
            saved=saved,
            saves=bool(session.program.options.cache),
        )

    def _saved_graphs(self, *, base: bool) -> SavedGraphs | None:
        """This entry's graphs that other processes saved; None where torch cannot save graphs, and
        without `Options.cache`, unless graphs are compiled beside the calls."""
        folder = None if self.tiers is None else self.tiers.compilers.folder
        option = self.session.program.options.cache or folder
        if not option or not saves_graphs():
            return None
        paths = {id(module): path for path, module in self.session.program.model.named_modules()}
        entry = {
            "function": self.target,
            "module": paths.get(id(self.module)),
            "name": self.name,
            "base": base,
            **self.slots._asdict(),
            "packed": self.roles.packed,
            "dynamic": self.session.dynamic,
        }
        from lorafx.capture.saved_graphs.saved_graphs import SavedGraphs

        return SavedGraphs(self.session.backend, option, entry, folder)

    def _traced_for(self, state: tuple[int, ...], *, base: bool) -> Traced:
        if (state, base) not in self.traced:
            kept = (_INITIAL_STATE, state)
            self.traced = {key: traced for key, traced in self.traced.items() if key[0] in kept}
            self.traced[state, base] = self._new_traced(base=base)
        return self.traced[state, base]

    @property
    def looping(self) -> tuple[str, ...]:
        """The experts that the batch touches and the base runs in a loop, which Dynamo breaks into
        pieces."""
        program = self.session.program
        touched = (s for s in self.experts if program.is_touched(s) and loops(s.module))
        return tuple(site.path for site in touched) if program.runtime.active else ()


#: The state of a model of which nothing has changed.
_INITIAL_STATE = (0, 0, 0, 0, 0)


def _base_graphs(session: Session) -> bool | str:
    """`Options.base_graphs`, with "auto" resolved for the model.

    On a CPU a graph with adapters takes as long as the base's if no row has one. On a GPU each
    kernel reads the slots of its rows. The fast path of nn.MultiheadAttention, which adapters
    switch off, writes zeros where a batch is padded, so such a model has graphs of the base.
    """
    options, device = session.program.options, session.program.runtime.device
    if options.base_graphs != "auto":
        return options.base_graphs
    if options.lowering == "reference" or session.has_mha:
        return not options.batch_invariant
    return False if device.type == "cpu" else "warmup"


def _weak_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without a strong reference to its object: Dynamo never frees a backend."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any, **settings: Any) -> Any:
        strong = reference()
        assert strong is not None
        return strong(*arguments, **settings)

    return call


def _fix_image_sizes(named: Mapping[str, Any]) -> None:
    """Make all sizes of image tensors but the number of requests constants of the graphs."""
    for name in IMAGES:
        value = named.get(name)
        if isinstance(value, Tensor) and value.dim() == 4:
            mark_fixed_shape(value, (1, 2, 3))


def _to_trace(
    program: Program, module: nn.Module, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """The function that Dynamo traces for the module's `forward`. A module that is a site itself is
    traced with its marks."""
    if all(site.module is not module for site in program.sites):
        return forward
    if module is program.model and not isinstance(vars(module).get("forward"), ReplacedMethod):

        def call(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        return call
    marks = [hook for hook in module._forward_hooks.values() if isinstance(hook, MARKS)]

    def marked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for mark in marks:
            changed = mark(module, args, kwargs, output)
            output = output if changed is None else changed
        return output

    return marked


#: The code of the frame whose callee Dynamo compiles.
_RUNS_GRAPHS: Final = Entry.run_graph.__code__


def entered(frame: FrameType) -> bool:
    """Whether a frame is that of an entry that serves a call."""
    return frame.f_code is _RUNS_GRAPHS
