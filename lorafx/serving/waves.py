"""Batches of more adapters than there are slots: a call, or a generation, in waves of its rows.

    rows, each with its adapters → waves, each with no more adapters than find a slot
                                 → a call each, in order → the results in the order of the rows

A request's result does not depend on its neighbours, so this is what the batch would have given.
Which rows of an argument are whose is what `lorafx.program.roles` says, as for the batch itself.
What cannot be cut, or put together again, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorafx.adapter_store.names import BASE
from lorafx.adapter_store.store import AdapterStore
from lorafx.program.roles import RoleTable
from lorafx.serving.row_trees import PLAIN, BatchRows, Joined
from lorafx.session.requests import Names

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel

#: Runs the model with these arguments for these requests: adapter names, and which of them each
#: token uses.
_Call = Callable[[Sequence[Any], Mapping[str, Any], "Names | None", "Tensor | None"], Any]

#: What `generate` takes that all requests share.
_SHARED = ("generation_config", "tokenizer")


def call_in_waves(
    compiled: CompiledModel,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Names | None,
    tokens: Tensor | None,
) -> Any:
    """What `call` returns for these arguments, in as many calls as the slots need.

    Raises:
        BatchError: an argument or a result cannot be cut by rows, or put together again.
        Otherwise as a call.
    """
    if names is None or not _may_overflow(compiled):
        return call(args, kwargs, names, tokens)
    kept = compiled._session.fetched(names, tokens)  # noqa: F841 - before the lock is taken
    with compiled._session.lock:
        waves = _waves(compiled, names, tokens)
        roles = compiled.entry(compiled.model, per_token=tokens is not None).roles
        given = len(names) if tokens is None else len(tokens)
        if waves is None or roles.rows(roles.bind(tuple(args), kwargs)) != given:
            return call(args, kwargs, names, tokens)
        rows = BatchRows(roles, compiled._session.program.config.row_dims, waves)
        rows.check(roles.bind(tuple(args), kwargs))
        results = []
        for at, wave in enumerate(waves):
            own_args, own_kwargs = roles.changed(args, kwargs, partial(rows.part, at))
            own = names if tokens is not None else [names[row] for row in wave]
            results.append(
                call(own_args, own_kwargs, own, None if tokens is None else tokens[wave])
            )
        return Joined(rows, several=False).of(results)


def generate_in_waves(
    compiled: CompiledModel,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Names | None,
) -> Any:
    """As `call_in_waves`, of `generate`.

    Sequences of a wave that ended before the longest are padded as those of one batch would be.

    Raises:
        BatchError: as `call_in_waves`; a cache, or what looks at rows by their number (processors
            of logits, criteria, streamers), was handed in; beams are to be traced
            (`beam_indices`); or waves took different numbers of steps, and more than the sequences
            is asked for.
    """
    model: Any = compiled.model
    if (
        names is None
        or not _may_overflow(compiled)
        or not callable(getattr(model, "generate", None))
    ):
        return call(args, kwargs, names, None)
    kept = compiled._session.fetched(names)  # noqa: F841 - before the lock is taken
    with compiled._session.lock:
        waves = _waves(compiled, names, None)
        if waves is None:
            return call(args, kwargs, names, None)
        config = compiled._session.program.config
        roles = RoleTable(model, config.row_dims, model.generate)
        main = getattr(model, "main_input_name", "inputs")
        bound = roles.bind(tuple(args), kwargs)
        named = {main if name == "inputs" else name: value for name, value in bound.items()}
        if roles.rows(named) != len(names):
            return call(args, kwargs, names, None)
        settings: Any = bound.get("generation_config") or getattr(model, "generation_config", None)
        rows = BatchRows(roles, config.row_dims, waves)
        shared = {name for name, value in bound.items() if _is_shared(name, value, settings)}
        rows.check({name: value for name, value in named.items() if name not in shared})

        def part(at: int, name: str, value: Any) -> Any:
            if name in shared:
                return value
            return rows.part(at, main if name == "inputs" else name, value)

        results = []
        for at, wave in enumerate(waves):
            own_args, own_kwargs = roles.changed(args, kwargs, partial(part, at))
            results.append(call(own_args, own_kwargs, [names[row] for row in wave], None))
        return Joined(rows, several=True, padding=_padding(bound, settings)).of(results)


def _may_overflow(compiled: CompiledModel) -> bool:
    """Whether waves are asked for, and possible: what calls around this one read stays in its
    slots, and a merged adapter needs none."""
    session = compiled._session
    if session.program.options.overflow != "waves":
        return False
    return not (session.running.here and session.running.entries)


def _waves(compiled: CompiledModel, names: Names, tokens: Tensor | None) -> list[list[int]] | None:
    """The rows of each wave; None where the batch is one, or no number of waves would do."""
    session = compiled._session
    if session.base.merged is not None:
        return None
    wanted = [frozenset[str]() if n is None or n == BASE else frozenset({n}) for n in names]
    for name in frozenset[str]().union(*wanted):
        session.store.check_known(name)
    if tokens is None:
        return waves_of(session.store, wanted)
    used = [[wanted[i] for i in row.unique().tolist() if i >= 0] for row in tokens]
    return waves_of(session.store, [frozenset[str]().union(*each) for each in used])


def waves_of(store: AdapterStore, rows: Sequence[frozenset[str]]) -> list[list[int]] | None:
    """Which of `rows`, by the adapters of each, run together; None where all do, or one of them
    alone finds no slots.

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
    """Whether an argument of `generate` is one of all requests."""
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
