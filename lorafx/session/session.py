"""A session: a program that serves calls, each request with its own adapter.

names of the requests → rows of the batch → slots in the store → the runtime that marks read
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from lorafx.adapter_store.peft_model import notes_of_peft
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.store import AdapterStore, StoredAdapter
from lorafx.capture.backend import Backend
from lorafx.errors import (
    BatchError,
    CaptureError,
    CheckpointError,
    ConfigError,
    ReplacedModuleError,
)
from lorafx.interrupts import free_after_fork
from lorafx.program.program import Program
from lorafx.program.roles import TOKEN_DIMS, RoleTable
from lorafx.session.requests import Names, served_by
from lorafx.session.stand_ins import ReplacedAttribute, put_back

if TYPE_CHECKING:
    from lorafx.session.resting import Resting

T = TypeVar("T")


class Named(Protocol):
    """What a session knows of the adapter that is merged (lorafx.base_weights.merge)."""

    @property
    def name(self) -> str: ...


@dataclass(eq=False)
class Session:
    """What all entries of one CompiledModel share.

    Attributes:
        requests: the adapter of each request of the running call; None outside a call.
        tokens: (B, T) which of `requests` each token uses, -1 for the base; None otherwise.
        repeats: rows of one request may follow one another (beams, returned sequences), as
            `generate` expands them.
        depth: calls that are running, one inside the other.
        entries: of them, compiled forwards.
        merged: the adapter that the base weights hold, None where they are the base's own.
    """

    program: Program
    store: AdapterStore
    backend: Backend
    dynamic: bool | None
    default: str | None = None
    requests: tuple[str | None, ...] | None = None
    tokens: Tensor | None = None
    repeats: bool = False
    force_active: bool = False
    depth: int = 0
    entries: int = 0
    merged: Named | None = None
    #: Why the base weights cannot be served, "" where they can.
    broken: str = ""
    #: Why calls are refused though the weights are whole: an adapter is merged no longer. Says
    #: nothing where one is.
    unmerged: str = ""
    #: The base weights are being written, and whoever gives the new ones may call the model.
    updating: bool = False
    #: The running calls only have graphs captured: nothing of their results is used, so what could
    #: not be served rightly is not refused.
    warming: bool = False
    #: Whom marks ask outside of entries.
    resting: Resting | None = None
    #: Those of models that share modules with this one (lorafx.session.sharing).
    neighbours: tuple[Session, ...] = ()
    #: Whether it can serve beside such sessions.
    takes_turns: ClassVar[bool] = True
    has_mha: bool = field(init=False)
    #: The model had notes of PEFT's when it was marked, which mean nothing then.
    noted_before: bool = field(init=False)
    #: Attributes of modules that `generate` has replaced while it runs.
    replaced: Sequence[ReplacedAttribute] = ()
    #: The last call with adapters had graphs captured, or there was none.
    capturing: bool = True
    #: The thread whose calls, or whose update, are running.
    _thread: int | None = None
    #: The adapters that were served last, and the sites that they touch.
    _served: list[StoredAdapter] = field(default_factory=list)
    _touched: frozenset[str] = frozenset()
    _rescaled: frozenset[str] = frozenset()
    #: One call at a time: slots and the running call are one state for all marks of the model.
    lock: threading.RLock = field(default_factory=threading.RLock)
    #: Held by what writes the base weights, and by what reads them without stopping calls. Taken
    #: before `lock` where both are, so that calls go on while somebody waits for it.
    weights_lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.has_mha = any(
            isinstance(module, nn.MultiheadAttention) for module in self.program.model.modules()
        )
        self.noted_before = notes_of_peft(self.program.model)
        _SESSIONS.add(self)

    def call(
        self,
        function: Callable[[], T],
        names: Names | None,
        *,
        repeats: bool = False,
        tokens: Tensor | None = None,
    ) -> T:
        """What `function` returns, which runs the model for these requests; None stands for the
        default adapter.

        Raises:
            BatchError: an adapter is merged into the base weights, and a request uses another one;
                or this very thread is updating the base weights.
            CaptureError: an update of the base weights was interrupted, or lost a merge.
            ReplacedModuleError: a module that holds the merged adapter was replaced.
        """
        thread = threading.get_ident()
        with self.lock:
            if self.updating:
                raise BatchError(
                    "the base weights are being updated; call the model after the update"
                )
            self.refuse_broken()
            if self.unmerged and self.merged is None and not self.warming:
                raise CaptureError(self.unmerged)
            if self.merged is not None and not self.warming:
                names, tokens = served_by(self.merged.name, names, tokens)
                self.program.refuse_missing(self.store[self.merged.name].sites)
            requests = None if names is None else tuple(names)
            before = self.requests, self.repeats, self.tokens, self.depth
            # No context manager: an interrupt where its exit begins would leave all this, and the
            # lock, as it is in a call. Nothing can come between plain assignments.
            try:
                self._thread, self.depth = thread, self.depth + 1
                self.requests, self.repeats, self.tokens = requests, repeats, tokens
                return function()
            finally:
                self.requests, self.repeats, self.tokens, self.depth = before
                if not self.entries:
                    self.program.call = None
                    # The marks stay on the model: called by itself it is the base model.
                    self.program.runtime.active = False

    def set_batch(self, roles: RoleTable, named: Mapping[str, Any]) -> None:
        """Give every row of the call its slot.

        Raises:
            BatchError: names and rows do not fit together.
            UnknownAdapterError, CapacityError: from the store, before anything has changed.
        """
        rows = roles.rows(named)
        names = self._row_names(rows)
        if self.merged is not None and not self.warming:
            names = [None] * len(names)  # the base's graph, over the merged weights
        program = self.program
        self._set_slots(roles, named, names, self.store.acquire(names))
        if not program.runtime.uniform and rows is not None:
            roles.check_rows(named, rows)

    def set_tokens(self, roles: RoleTable, named: Mapping[str, Any]) -> None:
        """Give every token of the call its slot, as `tokens` says.

        Raises:
            BatchError: arguments with one entry per token do not have the shape of `tokens`.
            As `set_batch`.
        """
        assert self.tokens is not None
        assert self.requests is not None
        rows, length = self.tokens.shape
        roles.check_rows(named, rows)
        for name, dim in TOKEN_DIMS.items():
            value = named.get(name)
            if not isinstance(value, Tensor) or roles.role(name, value).dim != 0:
                continue
            if value.dim() > dim and value.shape[dim] != length:
                raise BatchError(
                    f"adapter_slots has shape {(rows, length)}, and {name!r} "
                    f"{tuple(value.shape)}: calls with one slot per token take whole "
                    "sequences, without a cache of earlier tokens"
                )
        names = [self.requests[i] if i >= 0 else None for i in self.tokens.flatten().tolist()]
        self._set_slots(roles, named, names, self.store.acquire(names))

    def _set_slots(
        self, roles: RoleTable, named: Mapping[str, Any], names: Names, slots: Sequence[int]
    ) -> None:
        self.serve(names, slots)
        self.program.call = self.program.new_call(roles, named, tracks=True)

    def serve(self, names: Names, slots: Sequence[int]) -> None:
        """Serve rows of these adapters, which have these slots.

        Raises:
            ReplacedModuleError: a module that carries one of them was replaced or taken out.
        """
        program = self.program
        if not self.backend.records:  # nothing has run yet
            program.note_constants()
        program.runtime.set_rows(slots)
        program.runtime.active |= self.force_active
        distinct = dict.fromkeys(n for n, slot in zip(names, slots, strict=True) if slot >= 0)
        stored = [self.store[name] for name in distinct if name is not None]
        if [id(adapter) for adapter in stored] != [id(adapter) for adapter in self._served]:
            touched = frozenset().union(*(adapter.sites for adapter in stored))
            rescaled = frozenset().union(*(adapter.rescaled for adapter in stored))
            self._served, self._touched, self._rescaled = stored, touched, rescaled
        program.touched = frozenset() if self.warming else self._touched
        program.rescaled = frozenset() if self.warming else self._rescaled
        program.refuse_missing(program.touched)

    def forget_served(self) -> None:
        """Keep no adapter that was served alive."""
        self._served, self._touched, self._rescaled = [], frozenset(), frozenset()

    def repeating(self) -> bool:
        """Whether rows of one request may follow one another though `repeats` does not say so."""
        return False

    def load(self, source: Any, name: str, strict: bool | None = None) -> None:
        """Read an adapter folder and keep it in host memory, in place of one of the same name.

        `strict` as in `Options`, whose value None stands for.

        Raises:
            CheckpointError, UnsupportedAdapterError, CapacityError: nothing has changed then.
            ConfigError: the adapter of this name is merged.
            ReplacedModuleError: a module that it is for was replaced or taken out.
            BatchError: the call that is running on this thread serves it.
        """
        self.refuse_merged(name, "is replaced")
        self.refuse_served(name, "replace")
        program = self.program
        program.look_at_modules()
        try:
            adapter = read_adapter(
                source,
                name,
                program.sites,
                model=program.model,
                max_rank=program.config.max_rank,
                lora_config=program.config,
                strict=program.options.strict if strict is None else strict,
            )
        except CheckpointError as error:  # of which a module that is missing may be the reason
            try:
                program.refuse_missing()
            except ReplacedModuleError as reason:
                raise reason from error
            raise
        if adapter.magnitudes and self.merged is not None:
            raise ConfigError(
                f"{name!r} is a DoRA adapter, whose norms come from the base's own weights, "
                f"but {self.merged.name!r} is merged into them; call unmerge() before "
                "loading it"
            )
        program.refuse_missing(
            [
                site.path
                for site in program.sites
                if any(site.part_path(part) in adapter.weights for part in range(len(site.parts)))
            ]
        )
        self.store.load(adapter)
        self.forget_served()

    def refuse_running(self, what: str) -> None:
        """Raise BatchError where a call or an update of the weights runs on this very thread, and
        `what` is to be done after it. Asked before any lock is waited for."""
        self.refuse_updating(what)
        if self.depth and self._thread == threading.get_ident():
            raise BatchError(f"a call is running on this thread; {what} when it has returned")

    def refuse_updating(self, what: str) -> None:
        """As `refuse_running`, for an update alone, whose source of weights may use the model."""
        if self.updating and self._thread == threading.get_ident():
            raise BatchError(
                f"an update of the base weights is running on this thread; {what} when it has ended"
            )

    def refuse_served(self, name: str, what: str) -> None:
        """Raise BatchError where the call that is running on this very thread, which holds the
        lock, serves this adapter."""
        served = (self.default,) if self.requests is None else self.requests
        if self.depth and name in served:
            raise BatchError(
                f"the call that is running serves {name!r}; {what} it when the call has returned"
            )

    def update(self, function: Callable[[], T]) -> T:
        """What `function` returns, which writes the base weights. The locks are held."""
        thread = threading.get_ident()
        try:
            self.updating, self._thread = True, thread
            return function()
        finally:
            self.updating = False

    def after_fork(self, locks: dict[int, threading.RLock]) -> None:
        """In a child process: free of the calls that other threads of the parent were in. `locks`
        are those that stand for others, which sessions may share."""
        old = id(self.weights_lock), id(self.lock)
        self.weights_lock = locks.setdefault(old[0], free_after_fork(self.weights_lock))
        lock = locks.setdefault(old[1], free_after_fork(self.lock))
        if lock is not self.lock:
            self.lock = lock
            self.depth, self.requests, self.tokens, self.repeats = 0, None, None, False
            self.warming = self.force_active = self.updating = False
            self.entries, self.program.call, self.program.runtime.active = 0, None, False
            self.program.runtime.resting = self.resting
            put_back(self.replaced)
            self.replaced = ()
        self.store.after_fork()

    def refuse_broken(self) -> None:
        """Raise CaptureError where an update left the base weights partly written, or the base is
        no base any more."""
        if self.broken:
            raise CaptureError(self.broken)
        self.refuse_injected()

    def refuse_injected(self) -> None:
        """Raise CaptureError where PEFT has put adapters into the model since it was marked: every
        row would have them."""
        if notes_of_peft(self.program.model) and not self.noted_before:
            raise CaptureError(
                f"PEFT has put adapters into this {type(self.program.model).__name__} after "
                "lorafx was given it (it has a peft_config now), and every row would get "
                "them. Load adapters with load_adapter(folder, name) of the compiled "
                "model. To go on, detach() it and give the model to lorafx again, which "
                "takes over these adapters"
            )

    def refuse_merged(self, name: str | None, what: str) -> None:
        """Raise ConfigError where the base weights hold this adapter."""
        if self.merged is not None and self.merged.name == name:
            raise ConfigError(
                f"{name!r} is merged into the base weights; call unmerge() before it {what}"
            )

    def _row_names(self, rows: int | None) -> Names:
        if self.requests is None:
            return [self.default] * (rows or 1)
        if rows is None:
            if len(set(self.requests)) > 1:
                raise BatchError(
                    "no argument of this call carries requests, so its rows cannot use "
                    "different adapters; declare which one does with "
                    "LoraConfig(row_dims={argument: dim})"
                )
            return self.requests[:1]
        given = len(self.requests)
        if rows == given:
            return self.requests
        if given and rows % given == 0 and (self.repeats or self.repeating()):
            return [name for name in self.requests for _ in range(rows // given)]
        raise BatchError(
            f"adapter_names has {given} entries, but the batch has {rows} rows; give one "
            "name, or None for the base model, per row"
        )


#: All there are, for a child process.
_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    locks: dict[int, threading.RLock] = {}
    old = [(session.lock, session.weights_lock) for session in _SESSIONS]  # so that ids stay theirs
    for session in list(_SESSIONS):
        session.after_fork(locks)
    del old


os.register_at_fork(after_in_child=_after_fork)
