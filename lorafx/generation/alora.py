"""aLoRA: adapters that begin at a token of their sequence.

    b = the column of input_ids (B, T) where the last occurrence of the invocation tokens begins
    slot of the token in column t:  the adapter's where t ≥ b, else −1, as for a row without any

The search is that of PEFT (`calculate_alora_offsets`), in the ids of the call or of the prompts of
`generate`, including padding. A call of several tokens runs a graph with one slot per token. A
decode step runs the same graph as other calls.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import BASE, adapters_among, members
from lorafx.errors import BatchError, LorafxWarning, UnknownAdapterError
from lorafx.program.argument_roles import RoleTable, caches
from lorafx.program.frame import SlotForm
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.requests import Names, Requests
from lorafx.runtime.resting import refuse_elsewhere
from lorafx.runtime.session import Session

_IDS = "input_ids"


def any_begins(session: Session, names: Iterable[str | None]) -> bool:
    """Whether one of these adapters, or of the members of a sum, begins at a token. An adapter that
    is not loaded does not."""
    with suppress(UnknownAdapterError):  # the call itself raises it
        adapters = (member for name in adapters_among(names) for member in members(name))
        return any(session.store[name].invocation for name in adapters)
    return False


def forward_of(entries: CompiledForwards) -> Callable[..., Any]:
    """The compiled forward of the model, for the requests of the running call."""
    session = entries.session
    if session.requests.tokens_known or not _activates(session):
        return entries.of(entries.model, slots=session.requests.slot_form)
    return ActivatedForward(entries, entries.model)


def generating_forward_of(
    entries: CompiledForwards,
    module: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Callable[..., Any]:
    """The compiled forward of `module` for its `generate`, which is `run` with these arguments.
    Raises BatchError if an adapter begins at a token, and the prompts are no token ids."""
    session = entries.session
    if not _activates(session):
        return entries.of(module)
    named = RoleTable(module, session.program.config.row_dims, run).bind(args, kwargs)
    inputs = named.get("inputs")
    ids = named.get(_IDS) if inputs is None else inputs
    _check_ids(session, module, ids, "generate()")
    assert isinstance(ids, Tensor)
    names = session.requests.of_rows(ids.shape[0])
    return ActivatedForward(entries, module, _first_columns(session, names, ids), ids.shape[1])


def invocation_columns(ids: Tensor, invocation: Sequence[int]) -> list[int | None]:
    """The column where the last occurrence of `invocation` in each row of ids (B, T) begins."""
    count = len(invocation)
    if ids.shape[1] < count:
        return [None] * ids.shape[0]
    tokens = torch.tensor(invocation, dtype=ids.dtype, device=ids.device)
    matches = (ids.unfold(1, count, 1) == tokens).all(-1)
    columns = torch.arange(matches.shape[1], device=ids.device)
    last = torch.where(matches, columns, -1).amax(1).tolist()
    return [column if column >= 0 else None for column in last]


def warn_absent(name: str, invocation: Sequence[int]) -> None:
    """Warn that a request is served as the base, because its adapter never begins."""
    warnings.warn(
        f"{name!r} is an aLoRA adapter, and its invocation tokens {list(invocation)} do not occur "
        "in the token ids of a request, which is served as the base model. If they should, the "
        "invocation was tokenised in another way within the prompt",
        LorafxWarning,
        stacklevel=2,
    )


class ActivatedForward:
    """The forward of `module` for requests of which some have an adapter that begins at a token.
    For `generate`, `begins` is the column where the adapter of each prompt begins, None if it never
    does, and `length` is the length of the prompts."""

    def __init__(
        self,
        entries: CompiledForwards,
        module: nn.Module,
        begins: Sequence[int | None] | None = None,
        length: int = 0,
    ) -> None:
        self._session, self._module = entries.session, module
        self.begins, self._length = begins, length
        #: The number of tokens before the next forward of a generation, those of a cache included.
        self._past = 0
        self._by_row = entries.of(module)
        self.name, self.roles = self._by_row.name, self._by_row.roles
        self._by_token = entries.of(module, slots=SlotForm(per_token=True))
        functools.update_wrapper(self, module.forward)  # `generate` reads its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self._session
        refuse_elsewhere(session)
        if (serve := session.requests.serve) is not None:
            return serve(self, args, kwargs)
        names, begins, columns = self._rows_and_columns(self.roles.bind(args, kwargs))
        if len(columns) == 1:
            active = tuple(
                name if begin is not None and begin <= columns.start else None
                for name, begin in zip(names, begins, strict=True)
            )
            running = session.running._replace(requests=Requests(active, all_tokens=True))
            return session.note(running, functools.partial(self._by_row, *args, **kwargs))
        # `active`: graphs with adapters serve all these calls, also one in which none has begun.
        requests = _token_requests(names, begins, columns)
        running = session.running._replace(requests=requests, active=True)
        return session.note(running, functools.partial(self._by_token, *args, **kwargs))

    def _rows_and_columns(self, named: Mapping[str, Any]) -> tuple[Names, list[int | None], range]:
        """The adapter of each row, the column where it begins, and the columns of the call."""
        session, ids = self._session, named.get(_IDS)
        if self.begins is not None:
            tokens = named["inputs_embeds"] if ids is None else ids
            rows, length = tokens.shape[:2]
            owners = session.requests.owners or (0,) * rows
            begins = [self.begins[owner] for owner in owners]
            return session.requests.of_rows(rows), begins, self._columns(named, length)
        _check_ids(session, self._module, ids, "this call")
        assert isinstance(ids, Tensor)
        names = session.requests.of_rows(ids.shape[0])
        cached = any(_tokens_in(cache) != 0 for cache in caches(named))
        return names, _first_columns(session, names, ids, cached=cached), range(ids.shape[1])

    def _columns(self, named: Mapping[str, Any], length: int) -> range:
        """The columns of the next `length` tokens of a generation."""
        if length == 1 and self._past >= self._length:  # any column behind the prompt will do
            return range(self._past, self._past + 1)
        found = caches(named)
        count = _tokens_in(found[0]) if found else 0
        first = self._past if count is None else count
        self._past = first + length
        return range(first, self._past)


def _activates(session: Session) -> bool:
    """Whether a request of the running call has an adapter that begins at a token."""
    return session.base.merged is None and any_begins(session, session.requests.names)


def _invocation(session: Session, name: str | None) -> tuple[int, ...]:
    return () if name is None or name == BASE else session.store[name].invocation


def _first_columns(
    session: Session, names: Names, ids: Tensor, *, cached: bool = False
) -> list[int | None]:
    """The column where the adapter of each row begins; None, after a warning, if it never does.
    Raises BatchError if it may have begun among the tokens of a cache (`cached`)."""
    begins: list[int | None] = [0] * len(names)
    for name in dict.fromkeys(names):
        invocation = _invocation(session, name)
        if not invocation:
            continue
        rows = [row for row, adapter in enumerate(names) if adapter == name]
        for row, column in zip(rows, invocation_columns(ids[rows], invocation), strict=True):
            begins[row] = column
        absent = [row for row in rows if begins[row] is None]
        if not absent or session.running.warming:
            continue
        if cached:
            raise BatchError(
                f"row {absent[0]} names {name!r}, an aLoRA adapter, whose invocation tokens "
                f"{list(invocation)} are not among the new tokens of this call. "
                "Whether they are among the tokens of its cache is not known here. Call "
                "generate(), which remembers it; or give the adapter of each new token with "
                "adapter_slots=, shape (B, T); or name None, which is the base model"
            )
        warn_absent(str(name), invocation)
    return begins


def _token_requests(names: Names, begins: Sequence[int | None], columns: range) -> Requests:
    indices = {name: index for index, name in enumerate(adapters_among(names))}
    of_rows = torch.tensor([-1 if name is None else indices.get(name, -1) for name in names])
    starts = torch.tensor([columns.stop if begin is None else begin for begin in begins])
    column = torch.arange(columns.start, columns.stop)
    tokens = torch.where(column >= starts[:, None], of_rows[:, None], -1)
    return Requests(tuple(indices), tokens)


def _tokens_in(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # transformers' caches without attention
        return None


def _check_ids(session: Session, module: nn.Module, ids: Any, call: str) -> None:
    """Raise BatchError unless `ids` are token ids (B, T) of sequences that the model returns."""
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        why = f"{type(module).__name__} has an encoder and a decoder, with tokens of their own"
    elif not isinstance(ids, Tensor):
        why = f"{call} has none"
    elif ids.dim() != 2 or ids.is_floating_point():
        why = f"{call} has {tuple(ids.shape)} {ids.dtype}".replace("torch.", "")
    elif session.program.config.row_dims.get(_IDS, 0) != 0:
        why = "LoraConfig(row_dims=...) says that another dimension than 0 holds the requests"
    else:
        return
    name = next(name for name in session.requests.names if any_begins(session, [name]))
    raise BatchError(
        f"{name!r} is an aLoRA adapter, which is active from its invocation tokens "
        f"{list(_invocation(session, name))} on. They are looked for in input_ids, integers of "
        f"shape (B, T), and {why}. Give input_ids; in a call adapter_slots=, shape (B, T), gives "
        "the adapter of each token instead"
    )
