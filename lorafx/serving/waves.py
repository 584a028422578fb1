"""Batches of more adapters than there are slots: a call, or a generation, in waves of its rows.

A request's result does not depend on its neighbours, so this is what the batch would have given.
What cannot be cut by rows, or put together again, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lorafx.adapter_store.names import BASE
from lorafx.adapter_store.store import AdapterStore
from lorafx.program.roles import RoleTable
from lorafx.serving.entries import CompiledForwards
from lorafx.serving.row_trees import PLAIN, BatchRows, Joined
from lorafx.session.requests import Names
from lorafx.session.session import Session

#: Runs the model with these arguments for these requests: adapter names, and which of them each
#: token uses.
_Call = Callable[[Sequence[Any], Mapping[str, Any], "Names | None", "Tensor | None"], Any]

#: What `generate` takes that all requests share.
_SHARED = ("generation_config", "tokenizer")


def call_in_waves(
    entries: CompiledForwards,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Names | None,
    tokens: Tensor | None,
) -> Any:
    """What `call` returns for these arguments, in as many calls as the slots need; BatchError where
    an argument or a result cannot be cut by rows, or put together again."""
    session = entries.session
    if names is None or not _may_overflow(session):
        return call(args, kwargs, names, tokens)

    def roles() -> RoleTable:
        return entries.of(entries.model, per_token=tokens is not None).roles

    return _in_waves(session, call, args, kwargs, names, tokens, roles, generates=False)


def generate_in_waves(
    entries: CompiledForwards,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Names | None,
) -> Any:
    """As `call_in_waves`, of `generate`. Sequences of a wave that ended before the longest are
    padded as those of one batch would be.

    Raises:
        BatchError: as `call_in_waves`; what looks at rows by their number (processors of logits,
            criteria, streamers) was handed in; beams are to be traced (`beam_indices`); or waves
            took different numbers of steps, and more than the sequences is asked for.
    """
    session, model = entries.session, entries.model
    generate = getattr(model, "generate", None)
    if names is None or not _may_overflow(session) or not callable(generate):
        return call(args, kwargs, names, None)
    roles = partial(RoleTable, model, session.program.config.row_dims, generate)
    return _in_waves(session, call, args, kwargs, names, None, roles, generates=True)


def _in_waves(
    session: Session,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Names,
    tokens: Tensor | None,
    roles: Callable[[], RoleTable],
    *,
    generates: bool,
) -> Any:
    kept = session.fetched(names, tokens)  # noqa: F841 - before the lock is taken
    with session.lock:
        waves = _waves(session, names, tokens)
        if waves is None:
            return call(args, kwargs, names, tokens)
        model, table = session.program.model, roles()
        bound = table.bind(tuple(args), kwargs)
        settings = bound.get("generation_config") or getattr(model, "generation_config", None)
        renamed = {"inputs": getattr(model, "main_input_name", "inputs")} if generates else {}
        shared = {n for n, value in bound.items() if generates and _is_shared(n, value, settings)}
        named = {renamed.get(name, name): value for name, value in bound.items()}
        if table.rows(named) != (len(names) if tokens is None else len(tokens)):
            return call(args, kwargs, names, tokens)
        rows = BatchRows(table, session.program.config.row_dims, waves)
        rows.check({name: value for name, value in named.items() if name not in shared})

        def part(wave: int, name: str, value: Any) -> Any:
            return value if name in shared else rows.part(wave, renamed.get(name, name), value)

        results = []
        for number, wave in enumerate(waves):
            wave_args, wave_kwargs = table.changed(args, kwargs, partial(part, number))
            if tokens is None:
                of_rows = [names[row] for row in wave]
                results.append(call(wave_args, wave_kwargs, of_rows, None))
            else:
                results.append(call(wave_args, wave_kwargs, names, tokens[wave]))
        padding = _padding(bound, settings) if generates else None
        return Joined(rows, several=generates, padding=padding).of(results)


def _may_overflow(session: Session) -> bool:
    """Whether waves are asked for, and possible: what calls around this one read stays in its
    slots."""
    if session.program.options.overflow != "waves":
        return False
    return not (session.running.here and session.running.entries)


def _waves(session: Session, names: Names, tokens: Tensor | None) -> list[list[int]] | None:
    """The rows of each wave; None where the batch is one, or no number of waves would do."""
    if session.base.merged is not None:  # which needs no slot
        return None
    wanted = [frozenset[str]() if n is None or n == BASE else frozenset({n}) for n in names]
    for name in frozenset[str]().union(*wanted):
        session.store.check_known(name)
    if tokens is None:
        return waves_of(session.store, wanted)
    used = [[wanted[i] for i in row.unique().tolist() if i >= 0] for row in tokens]
    return waves_of(session.store, [frozenset[str]().union(*of_row) for of_row in used])


def waves_of(store: AdapterStore, rows: Sequence[frozenset[str]]) -> list[list[int]] | None:
    """Which of `rows`, by the adapters of each, run together; None where all do, or a row alone
    finds no slots.

    There are as few waves as the slots allow, with about as many adapters each, so that no wave is
    left with a single row, which has a graph of its own. Adapters that have slots come first:
    later waves may take those over.
    """
    every = frozenset[str]().union(*rows)
    if store.fits(every) or not all(map(store.fits, rows)):
        return None
    pinned, resident = store.pinned, store.resident
    count = len(every - pinned)
    most = max(store.max_adapters - len(pinned), 1)
    share = -(-count // -(-count // most)) if count else 0
    share = max(share, *(len(row - pinned) for row in rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row] - resident.keys()))
    waves: list[tuple[set[str], list[int]]] = []
    for row in order:
        for adapters, members in waves:
            joint = adapters | rows[row]
            if rows[row] <= adapters or (
                len(joint - pinned) <= share and store.fits(frozenset(joint))
            ):
                adapters |= rows[row]
                members.append(row)
                break
        else:
            waves.append((set(rows[row]), [row]))
    return [sorted(members) for _, members in waves]


def _is_shared(name: str, value: Any, settings: Any) -> bool:
    """Whether an argument of `generate` is of all requests."""
    return name in _SHARED or isinstance(value, PLAIN) or hasattr(settings, name)


def _padding(bound: Mapping[str, Any], settings: Any) -> int | None:
    """The token that fills the rows of sequences that have ended."""
    for name in ("pad_token_id", "eos_token_id"):
        value = bound.get(name)
        if value is None:
            value = getattr(settings, name, None)
        if isinstance(value, Tensor):
            value = value.flatten().tolist()
        if isinstance(value, Sequence):
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return None
