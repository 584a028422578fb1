"""Entry points: a module's forward, compiled for one program, with its batch set up on the host.

Once per call: the number of requests, each request's slot, the checks; then the compiled forward
runs and reads only tensors.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.store import AdapterStore
from lorafx.backend import Backend
from lorafx.compat import capture_settings, compile_entry, is_recompile_limit
from lorafx.errors import BatchError, CaptureError
from lorafx.guards import keep_guards
from lorafx.packing import repack
from lorafx.program import Call, Program
from lorafx.roles import IMAGES, TOKEN_DIMS, RoleTable

Names = Sequence["str | None"]


@dataclass(eq=False)
class Session:
    """What all entries of one CompiledModel share.

    Attributes:
        requests: the adapter of each request of the running call; None outside a call.
        tokens: (B, T) which of `requests` each token uses, -1 for the base; None otherwise.
        repeats: rows of one request may follow one another (beams, returned sequences), as
            `generate` expands them.
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
    has_mha: bool = field(init=False)
    #: One call at a time: slots and the running call are one state for all marks of the model.
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.has_mha = any(
            isinstance(module, nn.MultiheadAttention) for module in self.program.model.modules()
        )

    @contextmanager
    def serving(
        self, names: Names | None, *, repeats: bool = False, tokens: Tensor | None = None
    ) -> Iterator[None]:
        """Serve these requests inside the block; None stands for the default adapter."""
        with self.lock:
            before = self.requests, self.repeats, self.tokens
            self.requests = None if names is None else tuple(names)
            self.repeats, self.tokens = repeats, tokens
            try:
                yield
            finally:
                self.requests, self.repeats, self.tokens = before
                self.program.call = None
                # The marks stay on the model: called by itself it is the base model.
                self.program.runtime.active = False

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
        program = self.program
        self._set_slots(roles, named, names, self.store.acquire(names))
        if not program.runtime.uniform and rows is not None:
            _check_rows(roles, named, rows)

    def set_tokens(self, roles: RoleTable, named: Mapping[str, Any]) -> None:
        """Give every token of the call its slot, as `tokens` says.

        Raises:
            BatchError: arguments with one entry a token do not have the shape of `tokens`.
            As `set_batch`.
        """
        assert self.tokens is not None
        assert self.requests is not None
        rows, length = self.tokens.shape
        _check_rows(roles, named, rows)
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
        program = self.program
        program.runtime.set_rows(slots)
        program.runtime.active |= self.force_active
        program.call = Call(roles, named)
        distinct = {name for name, slot in zip(names, slots, strict=True) if slot >= 0}
        program.touched = frozenset().union(
            *(self.store[name].sites for name in distinct if name is not None)
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
        if self.repeats and given and rows % given == 0:
            return [name for name in self.requests for _ in range(rows // given)]
        raise BatchError(
            f"adapter_names has {given} entries and the batch has {rows} rows; give one name, "
            "or None for the base model, a row"
        )


def _check_rows(roles: RoleTable, named: Mapping[str, Any], rows: int) -> None:
    """Every argument that carries requests has `rows` of them, or one that all share."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            continue
        role = roles.role(name, value)
        if not role.known or role.dim is None:
            continue
        if value.dim() <= role.dim or value.shape[role.dim] not in (rows, 1):
            raise BatchError(
                f"argument {name!r} has shape {tuple(value.shape)}, but its dimension {role.dim} "
                f"should hold the {rows} requests; say which dimension does by "
                f"LoraConfig(row_dims={{{name!r}: dim}}), None when all requests share it"
            )


class Entry:
    """One module's forward, compiled. Called in place of it, by users and by `generate`."""

    def __init__(self, session: Session, module: nn.Module, *, per_token: bool = False) -> None:
        self.session = session
        self.module = module
        self.roles = RoleTable(module, session.program.config.row_dims)
        self.compiled = compile_entry(
            _target(session.program, module),
            session.backend.per_token if per_token else session.backend,
            dynamic=session.dynamic,
            recompile_limit=session.program.options.recompile_limit,
            keep_guards=functools.partial(keep_guards, module),
        )
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        named = self.roles.bind(args, kwargs) if args else kwargs
        if session.tokens is None:
            session.set_batch(self.roles, named)
        else:
            session.set_tokens(self.roles, named)
        _fix_image_sizes(named)
        _check_packing(session.program)
        limit = session.program.options.recompile_limit
        try:
            with torch.no_grad(), capture_settings(limit):
                if session.has_mha and session.program.runtime.active:
                    # Its fused inference path takes the weights past every module and mark.
                    with _no_mha_fast_path():
                        return self.compiled(*args, **kwargs)
                return self.compiled(*args, **kwargs)
        except Exception as error:
            if is_recompile_limit(error):
                raise CaptureError(
                    f"{type(self.module).__name__} has {limit} graphs, as many as "
                    f"Options.recompile_limit allows, and this call needs one more: {error}"
                ) from error
            raise


def _fix_image_sizes(named: Mapping[str, Any]) -> None:
    """Only the number of requests may vary in a graph that takes images."""
    for name in IMAGES:
        value = named.get(name)
        if isinstance(value, Tensor) and value.dim() == 4:
            torch._dynamo.mark_static(value, [1, 2, 3])


def _target(program: Program, module: nn.Module) -> Callable[..., Any]:
    """What Dynamo traces. A module that is a site itself is traced with its hooks."""
    if any(site.module is module for site in program.sites):

        def call(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        return call
    return module.forward


def _check_packing(program: Program) -> None:
    """Packed weights still are what the parameters are views of.

    Raises:
        CaptureError: the model was moved, cast or resized after compiling.
    """
    for packed in program.packed:
        if not packed.intact and not repack(packed):
            site = packed.group.sites[0]
            raise CaptureError(
                f"the weights of {site.path} and its siblings have changed shape, dtype or device "
                "since the model was compiled; change the model first and compile it then"
            )


@contextmanager
def _no_mha_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
