"""Sessions of marked models that their users compile themselves.

    with lorafx.adapters(model, ["sql", None]):      names → slots of the rows, for this block
        compiled(input_ids)                          graph → its session → rows checked → lookups

No object stands between the user and the model, so a call finds everything that it needs where it
runs: its session from the tensors that the graph takes, its arguments from the Python stack.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final

from torch import Tensor, nn

from lorafx.adapter_store.peft_model import without_wrappers
from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.backend import Backend
from lorafx.capture.checks import Checks
from lorafx.capture.traced import trace_again
from lorafx.capture.tracking import Tracking, untracked
from lorafx.capture.weights_in_python import WeightUses
from lorafx.errors import CaptureError, ConfigError
from lorafx.model.marks import Attachment, SiteMark
from lorafx.program.program import Program
from lorafx.program.roles import RoleTable
from lorafx.program.slips import refuse_called_slips
from lorafx.program.stack import RunningCall, generating, outermost_call, unwrapped
from lorafx.serving.compiled import compiled_of
from lorafx.session.requests import Requests
from lorafx.session.running import Around, refuse_transformed
from lorafx.session.session import Session, sessions
from lorafx.torch_compile.tasks import IN_A_BLOCK, OtherTasks, refuse_other_tasks
from lorafx.torch_internals.compat import block_settings


class AttachedSession(Session):
    """The session of a model that its users compile themselves.

    A block takes the place of a call: all calls inside it serve the same requests, so what one of
    them proved about the rows of a tensor holds in the next.
    """

    takes_turns: ClassVar[bool] = False

    def __init__(
        self, program: Program, store: AdapterStore, backend: Backend, attachment: Attachment
    ) -> None:
        super().__init__(program, store, backend, None)
        self._attachment: Final = attachment
        #: The options of torch.compile that the model was marked by; None for `lorafx.attach`.
        self.given: Mapping[str, Any] | None = None
        program.runtime.use_handle()
        program.runtime.session = self
        program.runtime.resting = OtherTasks(program.model)
        program.knowing_arguments = self.knowing_arguments

    @property
    def shares_graphs(self) -> bool:
        """Whether blocks without an adapter run the graphs with adapters: only where users ask."""
        return self.program.options.base_graphs is False

    def close(self) -> None:
        """Remove the marks; captured graphs serve the base model from then on. Raises CaptureError
        inside a block."""
        if self.running.depth:
            raise CaptureError("detach the model after the block of lorafx.adapters, not inside it")
        self._attachment.detach()
        self.program.runtime.session = None
        _BY_WEIGHT.clear()

    @contextmanager
    def block(
        self, names: str | Sequence[str | None] | None, tracking: Tracking | None = None
    ) -> Iterator[None]:
        """Serve these adapters inside the block; raises as `adapters`. `tracking` looks at what
        runs in Python, if somebody has made it do so already."""
        if names is None or isinstance(names, str):
            requests = Requests((names,), alike=True)
        else:
            requests = Requests(tuple(names))
        refuse_transformed()
        program, runtime = self.program, self.program.runtime
        kept = self.fetched(requests.names)  # noqa: F841 - before the lock is taken
        with self.locks.calls, ExitStack() as settings:
            self.refuse_injected()
            around = self.pause()
            before, batch = around.running, around.batch
            slots = self.store.acquire(requests.names)
            try:
                self.running = before.serving(requests)
                _BLOCKS.append(self)
                self.serve(requests.names, slots, program.new_call(None, {}))
                program.quantised.settle_again()
                settings.enter_context(self.module_paths())
                settings.enter_context(
                    block_settings(
                        program.options.recompile_limit,
                        sizes_by_data=program.quantised.sizes_by_data,
                    )
                )
                touched = program.batch.touched
                uses = WeightUses(program, inside_modules=True) if touched else None
                if uses is not None and tracking is None:
                    tracking = Tracking()
                    tracking.begin(settings)
                if tracking is not None:
                    tracking.uses = uses
                yield
                if uses is not None:
                    uses.refuse()
            except BaseException as error:
                trace_again(error)
                raise
            finally:
                self.running, program.batch, runtime.active = before, batch, self.at_rest
                if tracking is not None:
                    tracking.uses = None
                if _BLOCKS.count(self) > before.depth:
                    _BLOCKS.remove(self)
                self.go_on(around)

    def go_on(self, around: Around) -> None:
        """As of any session; a block around goes on with its requests, whose slots may have changed
        hands inside."""
        if around.running.depth:
            names = self.asked.names
            self.serve(names, self.store.acquire(names), around.batch.call)
        else:
            super().go_on(around)

    def after_fork(self, *, lost: bool) -> None:
        """As of any session; no block of another thread is open in a child."""
        super().after_fork(lost=lost)
        if not self.running.depth:
            _BLOCKS[:] = [session for session in _BLOCKS if session is not self]

    def begin(self, checks: Checks, arguments: Sequence[Any]) -> None:
        """Check the call that a graph serves, and give its rows their slots.

        Raises:
            BatchError: names and rows do not fit together, or the block is another task's.
            CaptureError: the model was changed since.
        """
        refuse_other_tasks()
        rows = checks.places.rows(arguments, called=True)
        # Between two graphs a size of one may be something that all requests share.
        if rows is not None and (rows > 1 or checks.begins_call):
            check = partial(checks.places.check_rows, arguments)
            self.set_rows(self.asked, rows, check, self.program.call)
        call = self.program.call
        mixed = checks.several[0] and not self.program.runtime.uniform
        if call is not None and checks.begins_call and mixed:
            untracked(lambda _: call.memory.own(self.program.buffers()))
        if not self.program.pack_watch.intact:
            untracked(lambda _: self.program.pack_watch.check())

    @contextmanager
    def knowing_arguments(self) -> Iterator[None]:
        """Inside, the program knows the arguments of the running call and their roles, which are
        found on the stack. Only a module that declares roles may stand for the model."""
        program, before, running = self.program, self.program.batch, self.running_call()
        call = program.new_call(None, {}) if before.call is None else replace(before.call)
        if running is not None:
            module = running.module
            if module is program.model or hasattr(module, "main_input_name"):
                call.roles = RoleTable(module, program.config.row_dims)
                call.named = call.roles.spread(call.roles.bind(running.args, running.kwargs))
        program.batch = before._replace(call=call)
        try:
            yield
        finally:
            program.batch = before

    def running_call(self) -> RunningCall | None:
        """The outermost running call of a module of the model."""
        return outermost_call(self.program.graph.has)

    def repeating(self) -> bool:
        return generating(self.program.model)

    def takes(self, tensors: Iterable[Tensor]) -> bool:
        """True where one of the tensors is a parameter, bank or buffer of this model."""
        known = self.program.known_tensors()
        return any(id(tensor) in known for tensor in tensors)


#: The sessions whose blocks are running, in any thread.
_BLOCKS: list[AttachedSession] = []
#: Where `session_of_weight` found a weight last.
_BY_WEIGHT: dict[int, weakref.ref[AttachedSession]] = {}


def attached_sessions() -> list[AttachedSession]:
    """The sessions of all marked models."""
    return [session for session in sessions() if isinstance(session, AttachedSession)]


def refuse_slips() -> None:
    """Look at the keywords of the running call of a marked model. Raises as
    `refuse_called_slips`."""
    models = {id(session.program.model) for session in attached_sessions()}
    refuse_called_slips(lambda module: id(module) in models, IN_A_BLOCK)


def captured_before(base: Callable[..., Any], examples: Sequence[Any]) -> Callable[..., Any]:
    """The graph of a model without LoRA, which refuses to serve adapters where LoRA has been
    attached since: Dynamo does not guard on hooks that were not there."""
    matrices = [
        position
        for position, example in enumerate(examples)
        if isinstance(example, nn.Parameter) and example.dim() == 2
    ]
    if not matrices:
        return base

    def run(*arguments: Any) -> Any:
        for session in _BLOCKS:
            program = session.program
            found = (program.site_of_weight(arguments[position]) for position in matrices)
            if any(site is not None and program.is_touched(site) for site in found):
                raise CaptureError(
                    f"this graph of {type(program.model).__name__} was captured before LoRA "
                    "was attached, so it has no LoRA; call torch._dynamo.reset() once, or "
                    "attach before the first call"
                )
        return base(*arguments)

    return run


def session_of_weight(weight: Tensor) -> AttachedSession | None:
    """The session of the model whose site's weight this is, or whose site's weight it holds."""
    known = _BY_WEIGHT.get(id(weight))
    likely = None if known is None else known()
    if likely is not None and likely.program.site_of_weight(weight) is not None:
        return likely
    for session in attached_sessions():
        if session.program.site_of_part(weight) is not None:
            _BY_WEIGHT[id(weight)] = weakref.ref(session)
            return session
    return None


def running_session() -> AttachedSession | None:
    """The session that serves the model that is running."""
    return next((item for item in _BLOCKS if item.running_call()), None)


def session_of(model: nn.Module) -> AttachedSession | None:
    """The session of a marked model, also through what torch.compile returned for it."""
    wanted = without_wrappers(unwrapped(model))
    for session in sessions():
        if session.program.model is wanted and isinstance(session, AttachedSession):
            return session
    return None


def marks_of(model: nn.Module) -> list[SiteMark]:
    """All marks on modules of the model, whose ever they are."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, SiteMark)]


def marked_session(model: nn.Module) -> AttachedSession:
    """The session of a marked model.

    Raises:
        ConfigError: the model is not marked, or is a copy of one that is.
    """
    session = session_of(model)
    if session is not None:
        return session
    name = type(model).__name__
    if compiled_of(unwrapped(model)) is not None:
        raise ConfigError(
            f"lorafx.compile serves this {name}, and this is for models that lorafx.attach marked; "
            "use the compiled model itself: calls take adapter_names=[...], set_adapter(name) "
            "chooses for calls that name none, and load_adapter(folder, name) is a method"
        )
    marks = marks_of(model)
    if any(isinstance(mark.runtime.session, AttachedSession) for mark in marks):
        raise ConfigError(
            f"this {name} contains, or is part of, a model that LoRA was attached to; pass "
            "that model"
        )
    if marks:
        raise ConfigError(
            f"this {name} carries marks of another model, as copies and pickles of a marked one "
            "do; lorafx.detach() it and attach LoRA again"
        )
    raise ConfigError(f"this {name} carries no LoRA; call lorafx.attach(model, lora_config) first")
