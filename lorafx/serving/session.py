"""A session: a program that serves calls, each request with its own adapter.

names of the requests → rows of the batch → slots in the store → the runtime that marks read
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.peft_model import notes_of_peft
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.store import BASE, AdapterStore, StoredAdapter
from lorafx.base_weights.merge import Merged
from lorafx.capture.backend import Backend
from lorafx.capture.program import Call, Program
from lorafx.errors import (
    BatchError,
    CaptureError,
    CheckpointError,
    ConfigError,
    ReplacedModuleError,
)
from lorafx.serving.roles import TOKEN_DIMS, RoleTable

Names = Sequence["str | None"]


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
    merged: Merged | None = None
    #: Why the base weights cannot be served, "" where they can.
    broken: str = ""
    #: Why calls are refused though the weights are whole: an adapter is merged no longer.
    unmerged: str = ""
    #: The base weights are being written, and whoever gives the new ones may call the model.
    updating: bool = False
    #: The running calls only have graphs captured: nothing of their results is used, so what could
    #: not be served rightly is not refused.
    warming: bool = False
    has_mha: bool = field(init=False)
    #: The model had notes of PEFT's when it was marked, which mean nothing then.
    noted_before: bool = field(init=False)
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

    @contextmanager
    def serving(
        self, names: Names | None, *, repeats: bool = False, tokens: Tensor | None = None
    ) -> Iterator[None]:
        """Serve these requests inside the block; None stands for the default adapter.

        Raises:
            BatchError: an adapter is merged into the base weights, and a request uses another one;
                or this very thread is updating the base weights.
            CaptureError: an update of the base weights was interrupted, or lost a merge.
            ReplacedModuleError: a module that holds the merged adapter was replaced.
        """
        with self.lock:
            self.refuse_broken()
            if self.updating:
                raise BatchError("the base weights are being updated; call the model after it")
            if self.unmerged and not self.warming:
                raise CaptureError(self.unmerged)
            if self.merged is not None and not self.warming:
                names, tokens = _served_by(self.merged.name, names, tokens)
                self.program.refuse_missing(self.store[self.merged.name].sites)
            before = self.requests, self.repeats, self.tokens
            self.requests = None if names is None else tuple(names)
            self.repeats, self.tokens = repeats, tokens
            self.depth += 1
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self.depth -= 1
                self.requests, self.repeats, self.tokens = before
                if not self.entries:
                    self.program.call = None
                    # The marks stay on the model: called by itself it is the base model.
                    self.program.runtime.active = False

    @contextmanager
    def only_capturing(self) -> Iterator[None]:
        """Calls inside only have graphs captured."""
        with self.lock:
            before, self.warming = self.warming, True
            try:
                yield
            finally:
                self.warming = before

    @contextmanager
    def forced_active(self) -> Iterator[None]:
        """Take the road of batches with adapters even where none is active."""
        self.force_active = True
        try:
            yield
        finally:
            self.force_active = False

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
            BatchError: arguments with one entry a token do not have the shape of `tokens`.
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
                    f"adapter_slots has shape {(rows, length)}, and {name!r} {tuple(value.shape)}: "
                    "calls with a slot a token take whole sequences, without a cache of earlier "
                    "tokens"
                )
        names = [self.requests[i] if i >= 0 else None for i in self.tokens.flatten().tolist()]
        self._set_slots(roles, named, names, self.store.acquire(names))

    def _set_slots(
        self, roles: RoleTable, named: Mapping[str, Any], names: Names, slots: Sequence[int]
    ) -> None:
        self.serve(names, slots)
        self.program.call = Call(roles, named)

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
            self._served = stored
            self._touched = frozenset().union(*(adapter.sites for adapter in stored))
            self._rescaled = frozenset().union(*(adapter.rescaled for adapter in stored))
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
        """
        self.refuse_merged(name, "is replaced")
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
                f"{name!r} is DoRA, whose norms are of the base's own weights, and those hold "
                f"{self.merged.name!r} now; unmerge() before it is loaded"
            )
        program.refuse_missing(
            [
                site.path
                for site in program.sites
                if any(site.part_path(part) in adapter.weights for part in range(len(site.parts)))
            ]
        )
        self.store.load(adapter)

    def refuse_running(self, what: str) -> None:
        """Raise BatchError where a call or an update of the weights runs on this very thread, and
        `what` is to be done after it. Asked before any lock is waited for."""
        self.refuse_updating(what)
        if self.depth and self._thread == threading.get_ident():
            raise BatchError(f"a call is running on this thread; {what} after it")

    def refuse_updating(self, what: str) -> None:
        """As `refuse_running`, for an update alone, whose source of weights may use the model."""
        if self.updating and self._thread == threading.get_ident():
            raise BatchError(
                f"an update of the base weights is running on this thread; {what} after it"
            )

    @contextmanager
    def updates(self) -> Iterator[None]:
        """The base weights are written inside the block."""
        self.updating, self._thread = True, threading.get_ident()
        try:
            yield
        finally:
            self.updating = False

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
                f"PEFT has put adapters into this {type(self.program.model).__name__} after lorafx "
                "was given it (it has a peft_config now), and every row would have them. Load "
                "adapters by load_adapter(folder, name) of the compiled model; to go on, detach() "
                "this one and give the model to lorafx again, which takes them over"
            )

    def refuse_merged(self, name: str | None, what: str) -> None:
        """Raise ConfigError where the base weights hold this adapter."""
        if self.merged is not None and self.merged.name == name:
            raise ConfigError(
                f"{name!r} is merged into the base weights; unmerge() before it {what}"
            )

    def _row_names(self, rows: int | None) -> Names:
        if self.requests is None:
            return [self.default] * (rows or 1)
        if rows is None:
            if len(set(self.requests)) > 1:
                raise BatchError(
                    "no argument of this call carries requests, so its rows cannot use different "
                    "adapters; say which one does by LoraConfig(row_dims={argument: dim})"
                )
            return self.requests[:1]
        given = len(self.requests)
        if rows == given:
            return self.requests
        if given and rows % given == 0 and (self.repeats or self.repeating()):
            return [name for name in self.requests for _ in range(rows // given)]
        raise BatchError(
            f"adapter_names has {given} entries and the batch has {rows} rows; give one name, "
            "or None for the base model, a row"
        )


def _served_by(
    merged: str, names: Names | None, tokens: Tensor | None
) -> tuple[Names | None, None]:
    """The requests of a call of a model into which `merged` is merged, which serves all of them.

    Raises:
        BatchError: a request, or a token, uses something else.
    """
    used = names
    if tokens is not None:
        assert names is not None
        used = [names[i] if i >= 0 else None for i in tokens.flatten().tolist()]
    others = dict.fromkeys(name for name in used or () if name != merged)
    if others:
        said = ", ".join("the base model" if n in (None, BASE) else repr(n) for n in others)
        raise BatchError(
            f"{merged!r} is merged into the base weights, and this call asks for {said}; "
            f"unmerge() to serve adapters side by side, or name {merged!r} or none"
        )
    return (names if tokens is None else [merged] * tokens.shape[0]), None


def checked_names(names: Sequence[str | None] | None) -> Sequence[str | None] | None:
    """`names` as given, once it is known to be a list of names.

    Raises:
        ConfigError: it is not; BatchError: it is empty.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(f"adapter_names is a list with one name, or None, a row; got {names!r}")
    if not names:
        raise BatchError("adapter_names is empty; give one name, or None, a row")
    for row, name in enumerate(names):
        if name is not None and not isinstance(name, str):
            raise ConfigError(
                f"adapter_names[{row}] is {name!r}; give a name, or None for the base model"
            )
    return names


def by_slots(
    slots: Tensor, names: Sequence[str | None]
) -> tuple[Sequence[str | None], Tensor | None]:
    """(names, slots a token), or (a name a request, None) where no row mixes adapters.

    Raises:
        BatchError: `slots` does not point at `names`.
    """
    if slots.dim() not in (1, 2) or slots.is_floating_point() or not slots.numel():
        raise BatchError(
            "adapter_slots holds integers of shape (B,) or (B, T), got "
            f"{tuple(slots.shape)} {slots.dtype}"
        )
    slots = slots.cpu()
    if not -1 <= int(slots.min()) <= int(slots.max()) < len(names):
        raise BatchError(
            f"adapter_slots holds {int(slots.min())} to {int(slots.max())}, but there are "
            f"{len(names)} adapters to point at ({', '.join(map(str, names)) or 'none'}); "
            "-1 is the base model"
        )
    by_request = slots if slots.dim() == 1 else slots[:, 0]
    if slots.dim() == 1 or bool((slots == by_request[:, None]).all()):
        return [names[i] if i >= 0 else None for i in by_request.tolist()], None
    return names, slots
