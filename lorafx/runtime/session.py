"""A session: a program that serves calls, each request with its own adapter.

call    names of the requests, noted as what is under way (`Running`)
run     a compiled forward within it, with its batch: names of the rows → slots in the store →
        the runtime; then what was there before, on interrupts too
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

from torch import Tensor, nn

from lorafx.adapter_store.names import BASE, members
from lorafx.adapter_store.peft_model import has_peft_attributes
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.adapter_store.store import AdapterStore, StoredAdapter
from lorafx.adapter_store.stored import Kept
from lorafx.capture.backend import Backend
from lorafx.errors import BatchError, CaptureError, ConfigError, MatchError
from lorafx.model.extras import EXTRAS, When
from lorafx.model.runtime import Runtime
from lorafx.program.argument_roles import RoleTable
from lorafx.program.program import AT_REST, Batch, Program
from lorafx.program.stack import refuse_called_slips
from lorafx.runtime.replaced_methods import StandIns
from lorafx.runtime.requests import (
    IN_BLOCKS,
    Requests,
    check_tokens,
    not_looked_for,
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
from lorafx.torch_internals.compat import no_mha_fast_path
from lorafx.torch_internals.versions import unsupported

T = TypeVar("T")

_NOTHING: Final = nullcontext()
_WAY = "the names to what lorafx.compile returned: cm(..., adapter_names=[...])"


@dataclass(frozen=True)
class Tier:
    """Counts of one place where adapters lie: how often one that was asked for was found there
    (`hits`) or not (`misses`), and how many had to go (`evictions`)."""

    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class Statistics:
    """Counts since the model was compiled.

    Attributes:
        hits: adapters of a batch that were in a slot already.
        loads: adapters that were written into a slot.
        evictions: adapters that lost their slot to another.
        waits: requests of continuous batching that were ready for a step and had no slot in it.
        tokens: tokens that continuous batching has run, prompts included, by adapter;
            "__base__" is the base model.
        nbytes: bytes of the banks ("banks"), of adapters in host memory ("host"), and of the files
            that they were read from ("disk"), now.
        tiers: "host", where adapters without a slot are looked for; "disk", from which those are
            read that host memory had no room for: its misses are files that had changed.
    """

    hits: int
    loads: int
    evictions: int
    waits: int
    tokens: Mapping[str, int] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    tiers: Mapping[str, Tier] = field(default_factory=dict)


@dataclass
class SessionCounts:
    """What a session counts by itself, in place: `waits` and `tokens` as in `Statistics`, and how
    often new base weights were written, or begun to be (`writes`), by updates of the session and of
    others that share them."""

    waits: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def with_those_of(self, store: AdapterStore) -> Statistics:
        """What adapters have done in a session with this store."""
        slots = store.hits, store.loads, store.evictions
        host = store.host
        tiers = {
            "host": Tier(host.hits, host.misses, host.evictions),
            "disk": Tier(host.misses - host.changed, host.changed, 0),
        }
        return Statistics(*slots, self.waits, dict(self.tokens), store.nbytes(), tiers)


class Served(NamedTuple):
    """Adapters, the sites that they touch, and have `EXTRAS` at, by their names; and one of them
    that begins at a token (aLoRA)."""

    adapters: tuple[StoredAdapter, ...] = ()
    touched: frozenset[str] = frozenset()
    extras: Mapping[When, frozenset[str]] = MappingProxyType({})
    begins: StoredAdapter | None = None

    @classmethod
    def of(cls, adapters: Sequence[StoredAdapter]) -> Served:
        """What these adapters change."""
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
    """What all calls of one model share.

    What is not final is a value that is replaced whole, by whom the comment says. `locks.calls` is
    held by whoever replaces `running`, `default` or `base`.
    """

    def __init__(
        self, program: Program, store: AdapterStore, backend: Backend, dynamic: bool | None
    ) -> None:
        self.program: Final = program
        self.store: Final = store
        #: What compiles its graphs: another one by lorafx.inspection.replay.
        self.backend = backend
        self.dynamic: Final = dynamic
        self.stand_ins: Final = StandIns()
        self.has_mha: Final = any(
            isinstance(module, nn.MultiheadAttention) for module in program.model.modules()
        )
        # Notes of PEFT's that were there before mean nothing.
        self._noted_before: Final = has_peft_attributes(program.model)
        #: What is under way: by `note` and `run`.
        self.running: Running = IDLE
        #: The adapter of calls that name none: by `choose`.
        self.default: str | None = None
        #: `Runtime.active` between calls: by `choose`.
        self.at_rest: bool | None = False
        #: What the base weights are: by lorafx.weights.
        self.base: BaseState = BaseState()
        #: Of models that share modules with this one, and with their locks: by
        #: lorafx.runtime.sharing.
        self.neighbours: tuple[Session, ...] = ()
        self.locks: Locks = Locks()
        self.accelerators: Final = accelerators(program.groups)
        #: The path of a site whose compiled forward has just returned to the module's own call,
        #: its delta included: by lorafx.generation.generate.
        self.returned_from: str | None = None
        #: Around calls while an engine runs the model with an attention that only its steps can
        #: use: by lorafx.generation.continuous.
        self.beside: Callable[[Callable[[], Any]], Any] | None = None
        self.counts: Final = SessionCounts()
        self._last_served = Served()  # by `serve`
        # What was worth a warning was said when it was loaded.
        store.read_with(partial(read_for, program, warn=False))
        _SESSIONS[id(self)] = self

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
        """Whether its marks are on the model."""
        return self.program.runtime.session is self

    @property
    def asked(self) -> Requests:
        """The requests of the running call; without one those of the block around, or of the
        default."""
        return (
            self.running.requests
            or IN_BLOCKS.get().get(id(self.program.model))
            or Requests((self.default,), alike=True)
        )

    @property
    def running_here(self) -> bool:
        """Whether a call runs on this very thread."""
        return self.running.depth > 0 and self.running.here

    def choose(self, default: str | None) -> None:
        """Have calls that name no adapter use this one. The lock is held."""
        self.default, self.at_rest = default, False if default is None else None
        if not self.running.depth:
            self.program.runtime.active = self.at_rest

    # --- the protocol of a call ---

    def call(
        self,
        function: Callable[[], T],
        requests: Requests | None,
    ) -> T:
        """What `function` returns, which runs the model for these requests; None stands for the
        default adapter.

        Raises:
            BatchError: an adapter is merged into the base weights, and a request uses another one;
                or this very thread is updating the base weights.
            CaptureError: an update of the base weights was interrupted.
            ReplacedModuleError: a module that holds the merged adapter was replaced.
            CheckpointError: an adapter has to be read again, and its files have changed.

        Also CaptureError as `refuse_transformed`, and UnsupportedVersionError as `unsupported`.
        """
        try:  # no context manager: it takes a microsecond
            refuse_transformed()
            kept = self.fetched(requests)  # noqa: F841 - before the lock is taken
            with self.locks.calls:
                running, merged = self.running, self.base.merged
                if running.updating:
                    raise BatchError(
                        "the base weights are being updated; call the model after the update"
                    )
                self.refuse_broken()
                if requests is None:
                    requests = Requests((self.default,), alike=True)
                if merged is not None and not running.warming:
                    requests = served_by(merged.name, requests)
                    self.program.refuse_missing(self.store[merged.name].sites)
                if not requests.packed:
                    function = partial(self.beside_engine, function)
                return self.note(running.serving(requests), function)
        except Exception as error:
            failure = unsupported(error)
            if failure is None:
                raise
            raise failure from error

    def beside_engine(self, function: Callable[[], T]) -> T:
        """What `function` returns, which runs the model outside of an engine's steps. The lock is
        held."""
        return function() if self.beside is None else self.beside(function)

    def fetched(self, requests: Requests | None) -> Kept | None:
        """What keeps the adapters of such a call in host memory; see `AdapterStore.fetch`."""
        if self.store.host.budget is None:
            return None
        if requests is None:
            return self.store.fetch([self.default])
        return self.store.fetch(
            requests.names if requests.tokens is None else requests.used().values()
        )

    def note(self, running: Running, action: Callable[[], T]) -> T:
        """What `action` returns, while `running` is under way: a call, whose forwards `run` with
        their batches. The lock is held."""
        before, runtime = self.running, self.program.runtime
        # No context manager: an interrupt where one begins would leave this as it is in a call.
        # None can come between plain assignments.
        try:
            self.running = running
            return action()
        finally:
            self.running = before
            if not before.entries:
                runtime.active = self.at_rest

    def run(self, running: Running, action: Callable[[], T]) -> T:
        """As `note`, of what reads or writes slots or base weights: a forward, an update. The batch
        that `action` sets is taken back with it: called by itself the model is the base."""
        self.locks.streams.follow(self.accelerators)
        program, runtime = self.program, self.program.runtime
        before, batch, rows, active = self.running, program.batch, runtime.rows, runtime.active
        resting: list[tuple[Runtime, bool | None]] = []
        try:  # as in `note`
            self.running = running
            if running.entries > before.entries:  # marks of models that share modules do nothing
                resting = [(o.program.runtime, o.program.runtime.active) for o in self.neighbours]
                for other, _ in resting:
                    other.active = False
            return action()
        finally:
            self.running, program.batch, runtime.active = before, batch, self.at_rest
            for other, was_active in resting:
                other.active = was_active
            if before.entries:  # what called this one from within goes on with its own batch
                runtime.set_rows(rows)
                runtime.active = active
            else:
                self.store.copy_streams.end_uses()

    def set_batch(self, roles: RoleTable, named: Mapping[str, Any]) -> None:
        """Give every row of the call its slot, or every token.

        Raises:
            BatchError: names and rows do not fit together, arguments with one entry per token do
                not have the shape of `adapter_slots`, or nobody has looked for the invocation
                tokens of an aLoRA adapter.
            UnknownAdapterError, CapacityError: from the store, before anything has changed.
            ReplacedModuleError: a module that carries an adapter was replaced or taken out.
        """
        program, running, requests = self.program, self.running, self.asked
        call, tokens = program.new_call(roles, named), requests.tokens
        if tokens is None:
            rows = roles.rows(named)
            names = requests.of_rows(rows, call=call)
            if self.base.merged is not None and not running.warming:
                names = [None] * len(names)  # the base's graph, over the merged weights
            slots = self.store.acquire(names, running.held)
            by_row: Sequence[int] | Tensor = slots
        else:
            if requests.packed:
                roles.check_rows(named, tokens.numel())
            else:
                check_tokens(tokens, roles, named)
            rows, used = None, requests.used()
            names = tuple(used.values())
            slots = self.store.acquire(names, running.held)
            by_row = requests.of_tokens(dict(zip(used, slots, strict=True)))
        if not self.backend.records:  # nothing has run yet
            program.note_constants()
        program.runtime.set_rows(by_row)
        if running.active:
            program.runtime.active = True
        distinct = dict.fromkeys(n for n, slot in zip(names, slots, strict=True) if slot >= 0)
        stored = tuple(self.store[name] for name in distinct if name is not None)
        served = self._last_served
        if [id(adapter) for adapter in stored] != [id(adapter) for adapter in served.adapters]:
            served = self._last_served = Served.of(stored)
        if served.begins and not requests.placed:
            raise not_looked_for(served.begins.name, served.begins.invocation)
        sites = () if running.warming else (served.touched, served.extras)
        program.batch = Batch(call, *sites)
        program.refuse_missing(program.batch.touched)
        if rows is not None and not program.runtime.uniform:
            roles.check_rows(named, rows)

    def forget_served(self) -> None:
        """Keep no adapter that was served alive."""
        self._last_served = Served()

    def module_paths(self) -> AbstractContextManager[None]:
        """Around a call: weights are used by their modules, where marks are seen."""
        if self.has_mha and self.program.runtime.active:
            return no_mha_fast_path()
        return _NOTHING

    def update(self, function: Callable[[], T]) -> T:
        """What `function` returns, which writes the base weights. The locks are held."""
        running = self.running._replace(updating=True, thread=threading.get_ident())
        self.counts.writes += 1
        return self.run(running, function)

    # --- what may not be done now ---

    def refuse_running(self, what: str) -> None:
        """Raise BatchError where a call or an update of the weights runs on this very thread, and
        `what` is to be done after it; CaptureError as `refuse_transformed`. Asked before any lock
        is waited for."""
        refuse_transformed()
        running = self.running
        if running.updating and running.here:
            raise BatchError(
                f"an update of the base weights is running on this thread; {what} when it has ended"
            )
        if running.depth and running.here:
            raise BatchError(f"a call is running on this thread; {what} when it has returned")

    def refuse_served(self, name: str, what: str) -> None:
        """Raise BatchError where the call that is running on this thread, which holds the lock,
        serves this adapter, by itself or in a sum."""
        served = (given for given in self.asked.names if given is not None)
        if self.running.depth and any(name in members(given) for given in served):
            raise BatchError(
                f"the call that is running serves {name!r}; {what} it when the call has returned"
            )

    def refuse_broken(self) -> None:
        """Raise CaptureError where an update left the base weights partly written, or the base is
        no base any more."""
        if self.base.broken:
            raise CaptureError(self.base.broken)
        self.refuse_injected()

    def refuse_injected(self) -> None:
        """Raise CaptureError where PEFT has put adapters into the model since it was marked: every
        row would have them."""
        if has_peft_attributes(self.program.model) and not self._noted_before:
            raise CaptureError(
                f"PEFT has put adapters into this {type(self.program.model).__name__} after "
                "lorafx was given it (it has a peft_config now), and every row would get "
                "them. Load adapters with load_adapter(folder, name) of the compiled "
                "model. To go on, detach() it and give the model to lorafx again, which "
                "takes over these adapters"
            )

    def refuse_merged(self, name: str | None, what: str) -> None:
        """Raise ConfigError where the base weights hold this adapter."""
        merged = self.base.merged
        if merged is not None and merged.name == name:
            raise ConfigError(
                f"{name!r} is merged into the base weights; call unmerge() before it {what}"
            )

    def after_fork(self, *, lost: bool) -> None:
        """In a child process: free of the calls that other threads of the parent were in, where
        they are `lost`."""
        if lost:
            program = self.program
            self.running, program.batch, program.runtime.active = IDLE, AT_REST, self.at_rest
            self.stand_ins.put_back()
        self.store.after_fork()


def read_for(
    program: Program, source: Any, name: str, *, strict: bool = False, warn: bool = True
) -> Adapter:
    """As `read_adapter`, for the program's sites."""
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


class Resting:
    """What the marks of a compiled model ask in eager mode (`Runtime.resting`): layers that run
    outside of the calls of its entries get no adapter."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def refuse(self, path: str, layer: str) -> None:
        """Refuse that the layer at `path` runs, where an adapter that is wanted changes it.

        Raises:
            MatchError: it does.
            BatchError: it is wanted by a call of another thread, between two of its forwards.
        """
        session = self._session
        running = session.running
        if running.entries or running.warming or session.base.merged is not None:
            return
        if any(other.running.entries for other in session.neighbours):
            return
        if (running.here or not running.depth) and session.returned_from == path:
            session.returned_from = None
            return
        for name in wanted(session):
            if path not in session.store[name].sites:
                continue
            refuse_elsewhere(session)  # it is the call of another thread that wants it
            reason = (
                f"{name!r} is the default that set_adapter chose"
                if session.asked.names == (session.default,)
                else f"adapter {name!r} was requested by this call"
            )
            raise MatchError(
                f"{layer} runs outside the compiled model's own calls, where nothing adds "
                f"its delta, but {reason}. Call the compiled model or a method of its class; "
                "after set_adapter(None), parts of the model that are called directly run "
                "as the base"
            )

    def refuse_slips(self) -> None:
        """As `refuse_called_slips`, of a call that is none of the compiled model's."""
        if not self._session.running.entries:
            model = self._session.program.model
            refuse_called_slips(lambda module: module is model, _WAY)

    def refuse_elsewhere(self) -> None:
        """As the function of this name: with an adapter active, the model itself, called on another
        thread, would get those of the call that is running."""
        refuse_elsewhere(self._session)


def refuse_elsewhere(session: Session) -> None:
    """Raise BatchError where a part of the model runs while another thread is in a call."""
    running = session.running
    if running.depth and not running.here:
        raise BatchError(
            f"this {type(session.program.model).__name__}, or a part of it, is called by itself "
            "while another thread is in a call of the compiled model, whose adapters it would get. "
            "Call the compiled model, which waits; adapter_names=[None, ...] is the base there"
        )


def wanted(session: Session) -> list[str]:
    """The adapters that the running call names, or the default where it names none."""
    return [name for name in dict.fromkeys(session.asked.names) if name not in (None, BASE)]


#: All of this process, as long as somebody keeps them. Also those that serve no more: a child
#: process frees their locks.
_SESSIONS: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def sessions() -> list[Session]:
    """Those that serve a model: compiled ones, and marked ones that their users compile."""
    return [session for session in _all() if session.serves]


def _all() -> list[Session]:
    # A list at once: while somebody walked over it, another thread might change the dictionary.
    found = (reference() for reference in _SESSIONS.valuerefs())
    return [session for session in found if session is not None]


def _after_fork() -> None:
    every = _all()
    shared = {id(session.locks): session.locks for session in every}
    lost = {key: locks.after_fork() for key, locks in shared.items()}
    for session in every:
        session.after_fork(lost=lost[id(session.locks)])


os.register_at_fork(after_in_child=_after_fork)
