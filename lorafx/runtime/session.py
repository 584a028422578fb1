"""A session serves the calls of a program, each request with its own adapter.

call    runs the model while the requests are noted as what is running (`Running`)
run     runs a compiled forward inside a call, which sets its batch: names of the rows → slots in
        the store → the runtime. Then the state before is restored, also after an interrupt

One file: its lock guards every attribute, and a part elsewhere would need to be told who holds it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from torch import Tensor, nn

from lorafx.adapter_store.names import Mixture, adapters_among, members
from lorafx.adapter_store.peft_model import has_peft_attributes
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.adapter_store.store import AdapterStore, StoredAdapter
from lorafx.adapter_store.stored import Kept
from lorafx.adapter_store.sums import refuse_in_gates
from lorafx.errors import BatchError, CaptureError, ConfigError
from lorafx.interrupts import undisturbed
from lorafx.model.extras import EXTRAS, When
from lorafx.model.replaced_methods import Replacements
from lorafx.model.runtime import Gates, Runtime
from lorafx.program.argument_roles import RoleTable
from lorafx.program.program import AT_REST, Batch, Program
from lorafx.runtime.gates import gates_of_rows, refuse_routes, routes_among
from lorafx.runtime.requests import (
    BLOCK_THREADS,
    IN_BLOCKS,
    Requests,
    alora_refusal,
    check_tokens,
    served_by,
)
from lorafx.runtime.running import (
    IDLE,
    BaseState,
    Locks,
    Running,
    accelerators,
    refuse_transformed,
)
from lorafx.runtime.statistics import SessionCounts
from lorafx.torch_internals.compat import no_mha_fast_path
from lorafx.torch_internals.graph_parts import _len_torch_dispatch_stack
from lorafx.torch_internals.versions import unsupported

if TYPE_CHECKING:  # imported with the first graph
    from lorafx.capture.backend import Backend
    from lorafx.capture.record import GraphRecord

T = TypeVar("T")

_NOTHING: Final = nullcontext()
_KEEPS_NOTHING: Final = Kept()


class Served(NamedTuple):
    """The adapters of a batch, the paths of the sites that they touch, those where they have
    `EXTRAS` (by name), and one of them that is activated at a token (aLoRA)."""

    adapters: tuple[StoredAdapter, ...] = ()
    touched: frozenset[str] = frozenset()
    extras: Mapping[When, frozenset[str]] = MappingProxyType({})
    alora: StoredAdapter | None = None

    @classmethod
    def of(cls, adapters: Sequence[StoredAdapter]) -> Served:
        return cls(
            tuple(adapters),
            frozenset().union(*(adapter.sites for adapter in adapters)),
            {
                n: frozenset().union(*(adapter.extras.get(n, ()) for adapter in adapters))
                for n in EXTRAS
            },
            next((adapter for adapter in adapters if adapter.invocation), None),
        )


class Session:
    """The state that all calls of one model share.

    An attribute that is not final is only ever assigned as a whole, by what its comment names.
    Assigning `running`, `default` or `base` requires `locks.calls`.
    """

    def __init__(
        self,
        program: Program,
        store: AdapterStore,
        new_backend: Callable[[Session], Backend],
        dynamic: bool | None,
    ) -> None:
        self.program: Final = program
        self.store: Final = store
        self._new_backend: Final = new_backend
        self.dynamic: Final = dynamic
        self.replacements: Final = Replacements()
        self.has_mha: Final = any(
            isinstance(module, nn.MultiheadAttention) for module in program.model.modules()
        )
        # PEFT's attributes that the model had before are no adapters put into it later.
        self._had_peft_notes: Final = has_peft_attributes(program.model)
        #: What is running: assigned by `call`, `note` and `run`.
        self.running: Running = IDLE
        #: The adapter of calls that name none: assigned by `choose`.
        self.default: str | None = None
        #: What the base weights hold: assigned by lorafx.weights.
        self.base: BaseState = BaseState()
        #: The sessions of models that share modules, and so `locks`, with this one: assigned by
        #: lorafx.runtime.sharing.
        self.neighbours: tuple[Session, ...] = ()
        self.locks: Locks = Locks()
        self.accelerators: Final = accelerators(program.groups)
        #: The path of a site whose compiled forward has just returned to the module's own call with
        #: the delta included: assigned by lorafx.generation.generate.
        self.returned_from: str | None = None
        #: Runs other calls while an engine has the model use an attention that only its own steps
        #: can use: assigned by lorafx.generation.continuous.
        self.outside_engine: Callable[[Callable[[], Any]], Any] | None = None
        #: Looks, before a call, at the model that is trained and whose weights this one shares:
        #: assigned by lorafx.compiled_model.sampler.
        self.follow: Callable[[], None] = lambda: None
        #: What users put in the place of the compiled model's forward, if anything; it calls that
        #: as `Running.inner`. Assigned by lorafx.compiled_model.as_module.
        self.patched: Callable[..., Any] | None = None
        self.counts: Final = SessionCounts()
        self._last_served = Served()  # assigned by `set_batch`, as is the next one
        self._called = False
        #: Whether the model was in training mode when that was last looked at, and warned about.
        self.trains = program.model.training
        # Warnings were given when the adapter was loaded.
        store.read_with(partial(read_for, program, warn=False))
        _SESSIONS[id(self)] = self

    @cached_property
    def backend(self) -> Backend:
        """Compiles the graphs; made with the first one, since what it imports takes a second.
        lorafx.runtime.replay and lorafx.package.export assign another one."""
        # An import defines operators, which an interrupted one could not define again.
        return undisturbed(partial(self._new_backend, self))

    @property
    def replays(self) -> bool:
        """Whether graphs are captured once more, to be looked at."""
        return "backend" in vars(self) and self.backend.lowering.replays

    @property
    def records(self) -> Sequence[GraphRecord]:
        """What became of each graph."""
        return self.backend.records if "backend" in vars(self) else ()

    @property
    def lock(self) -> threading.RLock:
        """See `Locks.calls`."""
        return self.locks.calls

    @property
    def weights_lock(self) -> threading.RLock:
        """See `Locks.weights`."""
        return self.locks.weights

    @property
    def serves(self) -> bool:
        """Whether the marks on the model are those of this session."""
        return self.program.runtime.session is self

    @property
    def requests(self) -> Requests:
        """The requests of the running call; without a call, those of the enclosing block of
        `lorafx.adapters`, or of the default adapter."""
        return (
            self.running.requests
            or IN_BLOCKS.get().get(id(self.program.model))
            or Requests((self.default,), uniform=True)
        )

    @property
    def running_here(self) -> bool:
        """Whether a call is running on this thread."""
        return self.running.depth > 0 and self.running.here

    def choose(self, default: str | None) -> None:
        """Make this the adapter of calls that name none. The caller holds the lock."""
        self.default = default
        self._rest()

    @property
    def active_at_rest(self) -> bool | None:
        """`Runtime.active` outside of calls."""
        expected = self.default is not None or BLOCK_THREADS.get(self.program.model)
        return None if expected else False

    def rest(self) -> None:
        """Update `Runtime.active` where a block begins or ends. A call of another thread does so at
        its end."""

        def update() -> None:
            if self.lock.acquire(blocking=False):
                try:
                    self._rest()
                finally:
                    self.lock.release()

        undisturbed(update)

    def _rest(self) -> None:
        if not self.running.depth:
            self.program.runtime.active = self.active_at_rest

    # --- the protocol of a call ---

    def call(
        self,
        find: Callable[[], Callable[..., T]],
        requests: Requests | None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> T:
        """Return the result of the function that `find` returns, with these arguments. Both run the
        model for these requests; None stands for the default adapter.

        Raises:
            BatchError: an adapter is merged into the base weights, and a request uses another one;
                or this thread is updating the base weights.
            CaptureError: an update of the base weights was interrupted.
            ReplacedModuleError: a module that holds the merged adapter was replaced.
            CheckpointError: an adapter must be read again, and its files have changed.

        Also CaptureError as `refuse_transformed`, and UnsupportedVersionError as `unsupported`.
        """
        try:  # not a context manager, which would take a microsecond
            refuse_transformed()
            if _len_torch_dispatch_stack():
                from lorafx.eager.following import inner_call
                from lorafx.eager.following import running as followed

                if followed() is not None:
                    return inner_call(partial(self.call, find, requests, args, kwargs))
            with self.fetch_adapters(requests), self.locks.calls:
                running, merged = self.running, self.base.merged
                if running.updating:
                    raise BatchError(
                        "the base weights are being updated; call the model after the update"
                    )
                self.refuse_broken()
                if requests is None:
                    requests = Requests((self.default,), uniform=True)
                if merged is not None and not running.warming:
                    requests = served_by(merged.name, requests)
                    self.program.refuse_missing(self.store[merged.name].sites)
                runtime, at_rest = self.program.runtime, self.active_at_rest
                try:  # as in `note`, without a step of its own
                    self.running = running.serving(requests)
                    function = find()
                    if requests.packed or self.outside_engine is None:
                        return function(*args, **kwargs)
                    return self.outside_engine(partial(function, *args, **kwargs))
                finally:
                    self.running = running
                    if not running.entries:
                        runtime.active = at_rest
                        runtime.active = self.active_at_rest
        except Exception as error:
            failure = unsupported(error)
            if failure is None:
                raise
            raise failure from error

    def run_outside_engine(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, which runs the model outside of an engine's steps. The
        caller holds the lock."""
        return function() if self.outside_engine is None else self.outside_engine(function)

    def fetch_adapters(self, requests: Requests | None) -> Kept:
        """Fetch the adapters of these requests into host memory (`AdapterStore.fetch`), before a
        lock is taken."""
        if self.store.host.budget is None:
            return _KEEPS_NOTHING
        if requests is None:
            return self.store.fetch([self.default])
        return self.store.fetch(
            requests.names if requests.tokens is None else requests.used().values()
        )

    def note(self, running: Running, action: Callable[[], T]) -> T:
        """Return the result of `action`, a call that is noted as `running` meanwhile; its forwards
        use `run`. The caller holds the lock."""
        before, runtime, at_rest = self.running, self.program.runtime, self.active_at_rest
        # An interrupt at the beginning of a context manager would leave the call's state behind.
        # None can come between plain assignments.
        try:
            self.running = running
            return action()
        finally:
            self.running = before
            if not before.entries:
                runtime.active = at_rest
                runtime.active = self.active_at_rest  # a block may have begun or ended meanwhile

    def run(self, running: Running, action: Callable[[], T]) -> T:
        """As `note`, for a forward or an update: what reads or writes slots or base weights. The
        batch that it sets is removed, so that the model called by itself is the base."""
        self.locks.streams.follow(self.accelerators)
        program, runtime = self.program, self.program.runtime
        before, batch, rows, active = self.running, program.batch, runtime.rows, runtime.active
        at_rest, deltas, gates = self.active_at_rest, runtime.deltas, runtime.gates
        resting: list[tuple[Runtime, bool | None]] = []
        try:  # as in `note`
            self.running, runtime.deltas = running, None
            if running.entries > before.entries:  # the marks of other models must add nothing
                resting = [(o.program.runtime, o.program.runtime.active) for o in self.neighbours]
                for other, _ in resting:
                    other.active = False
            return action()
        finally:
            # No call among these: an interrupt where one begins would leave the update's state.
            self.running, program.batch, runtime.active = before, batch, at_rest
            runtime.deltas = deltas
            for other, was_active in resting:
                other.active = was_active
            if before.entries:  # the forward around this one goes on with its own batch
                runtime.set_rows(rows, gates)
                runtime.active = active
            else:
                self.store.copy_streams.end_uses()
                runtime.active = self.active_at_rest  # a block may have begun or ended meanwhile

    def set_batch(self, roles: RoleTable, named: Mapping[str, Any], *, gates: int = 0) -> None:
        """Give every row, or every token, of the call its slot; or so many `gates`, if any.

        Raises:
            BatchError: names and rows do not fit together, arguments with one entry per token do
                not have the shape of `adapter_slots`, or the tokens at which an aLoRA adapter is
                activated are not known.
            ConfigError: gates for an adapter that is not linear in a weight.
            UnknownAdapterError, CapacityError: from the store, before anything has changed.
            ReplacedModuleError: a module that carries an adapter was replaced or removed.
        """
        program, running, requests = self.program, self.running, self.requests
        call, tokens, several = program.new_call(roles, named), requests.tokens, None
        if tokens is None:
            rows = roles.rows(named)
            names = requests.of_rows(rows, call=call)
            if self.base.merged is not None and not running.warming:
                names = [None] * len(names)  # the merged weights serve all rows
            count = len(names)
            if gates:
                names = [*names, *(n for route in routes_among(names) for n in route.experts)]
            else:
                refuse_routes(names)
            slots = self.store.acquire(names, running.slots_in_use, in_waves=True)
            row_slots: Sequence[int] | Tensor = slots[:count]
            if gates:
                beside = [n for n in adapters_among(names) if not isinstance(n, Mixture)]
                refuse_in_gates(map(self.store.__getitem__, beside), "a batch with a route")
                of_name = dict(zip(names, slots, strict=True))
                several = gates_of_rows(names[:count], of_name, gates)
                row_slots = several.slots[0]
        else:
            if requests.packed:
                roles.check_rows(named, tokens.numel())
            else:
                check_tokens(tokens, roles, named)
            rows, used = None, requests.used()
            names = tuple(used.values())
            refuse_routes(names)
            if requests.weights is not None:
                refuse_in_gates(map(self.store.__getitem__, adapters_among(names)))
            slots = self.store.acquire(names, running.slots_in_use)
            row_slots = requests.of_tokens(dict(zip(used, slots, strict=True)))
            if requests.weights is not None:
                weights = requests.weights.flatten(0, 1).movedim(0, -1).contiguous()
                several = Gates(row_slots, weights)
                row_slots = several.slots[0]
        if program.model.training is not self.trains:
            self.trains = program.model.training
            if self.trains:
                from lorafx.runtime.marking import warn_training

                warn_training(program.model, stacklevel=2)
        if not self._called:
            program.note_constants()
            self._called = True
        program.runtime.set_rows(row_slots, several)
        if running.active:
            program.runtime.active = True
        distinct = dict.fromkeys(n for n, slot in zip(names, slots, strict=True) if slot >= 0)
        stored = tuple(self.store[name] for name in distinct if name is not None)
        served = self._last_served
        if [id(adapter) for adapter in stored] != [id(adapter) for adapter in served.adapters]:
            served = self._last_served = Served.of(stored)
        if served.alora and not requests.tokens_known:
            raise alora_refusal(served.alora.name, served.alora.invocation)
        sites = () if running.warming else (served.touched, served.extras)
        program.batch = Batch(call, *sites)
        program.refuse_missing(program.batch.touched)
        if rows is not None and not program.runtime.uniform:
            roles.check_rows(named, rows)

    def compile_for(self, call: Callable[[], object]) -> None:
        """Make a call whose graph is compiled here where there is none, and drop its result."""
        with self.lock:
            self.note(self.running._replace(warming=True), call)

    def forget_served(self) -> None:
        """Drop the references to the adapters of the last batch."""
        self._last_served = Served()

    def without_mha_fast_path(self) -> AbstractContextManager[None]:
        """A context for a call in which nn.MultiheadAttention calls the modules that are marked."""
        if self.has_mha and self.program.runtime.active:
            return no_mha_fast_path()
        return _NOTHING

    def update(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, which writes the base weights; the locks are held."""
        running = self.running._replace(updating=True, thread=threading.get_ident())
        return self.run(running, function)

    # --- refusals ---

    def refuse_running(self, action: str) -> None:
        """Raise BatchError if a call or an update of the weights is running on this thread, and
        CaptureError as `refuse_transformed`. `action` is what to do then. No lock is needed."""
        refuse_transformed()
        running = self.running
        if running.updating and running.here:
            raise BatchError(
                "an update of the base weights is running on this thread; "
                f"{action} when it has ended"
            )
        if running.depth and running.here:
            raise BatchError(f"a call is running on this thread; {action} when it has returned")

    def refuse_served(self, name: str, action: str) -> None:
        """Raise BatchError if the running call serves this adapter, by itself or in a sum. This
        thread holds the lock, so the call is its own."""
        served = (adapter for adapter in self.requests.names if adapter is not None)
        if self.running.depth and any(name in members(adapter) for adapter in served):
            raise BatchError(
                f"the call that is running serves {name!r}; {action} it when the call has returned"
            )

    def refuse_broken(self) -> None:
        """Raise CaptureError if an update left the base weights partly written, or as
        `refuse_injected`; or what `follow` raises."""
        if self.base.broken:
            raise CaptureError(self.base.broken)
        self.follow()
        self.refuse_injected()

    def refuse_injected(self) -> None:
        """Raise CaptureError if PEFT has put adapters into the model after it was marked: every row
        would get them."""
        if has_peft_attributes(self.program.model) and not self._had_peft_notes:
            raise CaptureError(
                f"PEFT has put adapters into this {type(self.program.model).__name__} after "
                "lorafx was given it (it has a peft_config now), and every row would get "
                "them. Load adapters with load_adapter(folder, name) of the compiled "
                "model. To go on, detach() it and give the model to lorafx again, which "
                "takes over these adapters"
            )

    def refuse_merged(self, name: str | None, action: str) -> None:
        """Raise ConfigError if this adapter is merged into the base weights."""
        merged = self.base.merged
        if merged is not None and merged.name == name:
            raise ConfigError(
                f"{name!r} is merged into the base weights; call unmerge() before it {action}"
            )

    def after_fork(self, *, lost: bool) -> None:
        """Reset the state in a child process. `lost`: the parent was running a call on another
        thread, which does not exist here."""
        if lost:
            program = self.program
            self.running, program.batch, program.runtime.active = IDLE, AT_REST, self.active_at_rest
            self.replacements.put_back()
        self.store.after_fork()


def read_for(
    program: Program, source: Any, name: str, *, strict: bool = False, warn: bool = True
) -> Adapter:
    """The adapter as `read_adapter` reads it for the program's sites."""
    return read_adapter(
        source,
        name,
        program.sites,
        model=program.model,
        max_rank=program.config.max_rank,
        lora_config=program.config,
        strict=strict,
        warn=warn,
    )


#: All live sessions of this process, also those that serve no longer: a child process resets their
#: locks too.
_SESSIONS: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def sessions() -> list[Session]:
    """The sessions that serve a model, whether lorafx or its user compiled it."""
    return [session for session in _live_sessions() if session.serves]


def _live_sessions() -> list[Session]:
    # `valuerefs` copies, so that another thread may change the dictionary meanwhile.
    living = (reference() for reference in _SESSIONS.valuerefs())
    return [session for session in living if session is not None]


def _after_fork() -> None:
    all_sessions = _live_sessions()
    shared = {id(session.locks): session.locks for session in all_sessions}
    lost = {key: locks.after_fork() for key, locks in shared.items()}
    for session in all_sessions:
        session.after_fork(lost=lost[id(session.locks)])


os.register_at_fork(after_in_child=_after_fork)
