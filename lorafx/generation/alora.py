"""aLoRA: adapters that begin at a token of their sequence.

    b = the column of input_ids (B, T) where the last occurrence of the invocation tokens begins
    slot of the token in column t:  the adapter's where t ≥ b, else −1, as for a row without any

The search is PEFT's (`calculate_alora_offsets`), in the ids of the call, or of the prompts of
`generate`, with their padding. A call of several tokens runs a graph with one slot per token, a
decode step that of any other call.
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
from lorafx.runtime.entry import CompiledForwards
from lorafx.runtime.requests import Names, Requests
from lorafx.runtime.session import Session, refuse_elsewhere

_IDS = "input_ids"


def any_begins(session: Session, names: Iterable[str | None]) -> bool:
    """Whether one of these adapters, or of those in a sum, begins at a token."""
    given = adapters_among(names)
    with suppress(UnknownAdapterError):  # who serves the call says so
        named = (member for name in given for member in members(name))
        return any(session.store[name].invocation for name in named)
    return False


def forward_of(entries: CompiledForwards) -> Callable[..., Any]:
    """The compiled forward of the model, for the requests of the running call."""
    session = entries.session
    if session.requests.tokens_known or not _activates(session):
        return entries.of(entries.model, per_token=session.requests.tokens is not None)
    return ActivatedForward(entries, entries.model)


def generating_forward_of(
    entries: CompiledForwards,
    module: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Callable[..., Any]:
    """The same of `module`, for its `generate`, which is `run` and has these arguments. Raises
    BatchError where an adapter begins at a token, and there are no prompts of token ids."""
    session = entries.session
    if not _activates(session):
        return entries.of(module)
    named = RoleTable(module, session.program.config.row_dims, run).bind(args, kwargs)
    given = named.get("inputs")
    ids = named.get(_IDS) if given is None else given
    _check_ids(session, module, ids, "generate()")
    assert isinstance(ids, Tensor)
    names = session.requests.of_rows(ids.shape[0], repeats=True)
    return ActivatedForward(entries, module, _begins(session, names, ids), ids.shape[1])


def column_of(ids: Tensor, invocation: Sequence[int]) -> list[int | None]:
    """The column where the last occurrence of `invocation` in each row of ids (B, T) begins."""
    count = len(invocation)
    if ids.shape[1] < count:
        return [None] * ids.shape[0]
    wanted = torch.tensor(invocation, dtype=ids.dtype, device=ids.device)
    found = (ids.unfold(1, count, 1) == wanted).all(-1)
    columns = torch.arange(found.shape[1], device=ids.device)
    last = torch.where(found, columns, -1).amax(1).tolist()
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
    """The forward of `module` for requests of which some begin at a token. Called by `generate`,
    it is given the column where the adapter of each prompt begins, None where it never does, and
    the `length` of the prompts."""

    def __init__(
        self,
        entries: CompiledForwards,
        module: nn.Module,
        begins: Sequence[int | None] | None = None,
        length: int = 0,
    ) -> None:
        self._session, self._module = entries.session, module
        self._begins, self._length = begins, length
        #: Tokens that forwards of a generation have seen so far, those of a given cache included.
        self._seen = 0
        self._by_row = entries.of(module)
        self._by_token = entries.of(module, per_token=True)
        functools.update_wrapper(self, module.forward)  # `generate` looks at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self._session
        refuse_elsewhere(session)
        names, begins, columns = self._placed(self._by_row.roles.bind(args, kwargs))
        if len(columns) == 1:
            served = tuple(
                name if at is not None and at <= columns.start else None
                for name, at in zip(names, begins, strict=True)
            )
            now = session.running._replace(requests=Requests(served, all_tokens=True))
            return session.note(now, functools.partial(self._by_row, *args, **kwargs))
        # Graphs with adapters, also where none of them has begun: a batch where one has needs them.
        requests = _token_requests(names, begins, columns)
        now = session.running._replace(requests=requests, active=True)
        return session.note(now, functools.partial(self._by_token, *args, **kwargs))

    def _placed(self, named: Mapping[str, Any]) -> tuple[Names, list[int | None], range]:
        """The adapter of each row, the column where it begins, and the columns of the call."""
        session, ids = self._session, named.get(_IDS)
        if self._begins is not None:
            tokens = named["inputs_embeds"] if ids is None else ids
            rows, length = tokens.shape[:2]
            repeats = rows // len(self._begins)  # beams, returned sequences
            begins = [at for at in self._begins for _ in range(repeats)]
            names = session.requests.of_rows(rows, repeats=True)
            return names, begins, self._columns(named, length)
        _check_ids(session, self._module, ids, "this call")
        assert isinstance(ids, Tensor)
        names = session.requests.of_rows(ids.shape[0])
        cached = any(_tokens_in(cache) != 0 for cache in caches(named))
        return names, _begins(session, names, ids, cached=cached), range(ids.shape[1])

    def _columns(self, named: Mapping[str, Any], length: int) -> range:
        """The columns of the `length` tokens that a forward of a generation has."""
        if length == 1 and self._seen >= self._length:  # where exactly makes no difference
            return range(self._seen, self._seen + 1)
        held = caches(named)
        known = _tokens_in(held[0]) if held else 0
        first = self._seen if known is None else known
        self._seen = first + length
        return range(first, self._seen)


def _activates(session: Session) -> bool:
    """Whether a request of the running call has an adapter that begins at a token."""
    return session.base.merged is None and any_begins(session, session.requests.names)


def _invocation(session: Session, name: str | None) -> tuple[int, ...]:
    return () if name is None or name == BASE else session.store[name].invocation


def _begins(
    session: Session, names: Names, ids: Tensor, *, cached: bool = False
) -> list[int | None]:
    """The column where the adapter of each row begins; None where it never does, with a warning.
    BatchError where it may have begun among the tokens of a cache."""
    begins: list[int | None] = [0] * len(names)
    for name in dict.fromkeys(names):
        invocation = _invocation(session, name)
        if not invocation:
            continue
        rows = [row for row, of_row in enumerate(names) if of_row == name]
        for row, column in zip(rows, column_of(ids[rows], invocation), strict=True):
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
    """The requests of a call with these columns, token by token."""
    places = {name: place for place, name in enumerate(adapters_among(names))}
    place = torch.tensor([-1 if name is None else places.get(name, -1) for name in names])
    start = torch.tensor([columns.stop if at is None else at for at in begins])
    now = torch.arange(columns.start, columns.stop)
    tokens = torch.where(now >= start[:, None], place[:, None], -1)
    return Requests(tuple(places), tokens)


def _tokens_in(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it does not say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # transformers' caches without attention
        return None


def _check_ids(session: Session, module: nn.Module, ids: Any, what: str) -> None:
    """Raise BatchError unless `ids` are token ids (B, T) of the sequences that the model returns
    something for."""
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        why = f"{type(module).__name__} has an encoder and a decoder, with tokens of their own"
    elif not isinstance(ids, Tensor):
        why = f"{what} has none"
    elif ids.dim() != 2 or ids.is_floating_point():
        why = f"{what} has {tuple(ids.shape)} {ids.dtype}".replace("torch.", "")
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
